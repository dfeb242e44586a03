"""What every request passes before and after its handler: limits, tokens, the body, and one shape for all errors."""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import structlog
from aiohttp import web
from pydantic import ValidationError

from schemas.base import Message, validate_json
from schemas.errors import StoreBusy, Unavailable, Unprocessable
from streams.serving.auth import BearerTokens, RateLimiter
from streams.serving.config import ServeConfig
from streams.serving.connections import Connections
from streams.serving.reports import RequestReport

log = structlog.get_logger()

M = TypeVar("M", bound=Message)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RETRY_AFTER_SECONDS = "1"
MAX_MESSAGE_CHARACTERS = 500
"""Longest message of an error: it names fields, whose names come from the request."""


class ApiError(Exception):
    """An error that the handlers of requests raise, with its HTTP status and code."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


def edge(config: ServeConfig, connections: Connections, on_report: Callable[[object], None]) -> list[Any]:
    """The middlewares of the application, the outermost first."""
    middlewares = [_counting(connections), _reporting(on_report), _handling_errors(config.max_concurrent_requests)]
    if config.tokens or config.max_requests_per_second is not None:
        middlewares.append(_admitting(config))
    return middlewares


async def read_body(request: web.Request, model: type[M], config: ServeConfig) -> M:
    """Read and validate a request, as JSON. Raises `ApiError` naming each wrong field."""
    refuse_parameters(request)
    arrived = request.content.is_eof()  # as a rule with its head: no timer is needed
    try:
        async with nullcontext() if arrived else asyncio.timeout(config.body_seconds):
            raw = await request.read()
    except TimeoutError:
        raise ApiError(408, "too_slow", f"the request did not arrive within {config.body_seconds:g} s") from None
    raw = await _unpacked(raw, request.headers.get("Content-Encoding", "identity").strip().lower(), config)
    try:
        return validate_json(model, raw)
    except ValidationError as error:
        known = ", ".join(model.model_fields)
        wrong = [
            f"{'.'.join(str(part) for part in item['loc']) or 'body'}: "
            + (f"there is no such field (there are {known})" if item["type"] == "extra_forbidden" else item["msg"])
            for item in error.errors(include_url=False, include_input=False, include_context=False)[:5]
        ]
        raise ApiError(400, "bad_request", "; ".join(wrong)) from None


def refuse_parameters(request: web.Request, *known: str) -> None:
    """Raise `ApiError` for a parameter behind `?` that this route does not know, as for an unknown field."""
    for name in request.query:
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "there are none"
            raise ApiError(400, "bad_request", f"?{name}: there is no such parameter ({there_are})")


_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def _unpacked(raw: bytes, encoding: str, config: ServeConfig) -> bytes:
    """The body without its content encoding. A packed one is unpacked in a thread, and never beyond the limit."""
    if encoding in ("", "identity"):
        return raw
    if encoding not in _WINDOW_BITS:
        raise ApiError(415, "unsupported_encoding", "a body may be packed by gzip or deflate, or not at all")
    unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        body = await asyncio.to_thread(unpacking.decompress, raw, config.max_body_bytes + 1)
    except zlib.error as error:
        raise ApiError(400, "bad_request", f"body: not {encoding} ({error})") from None
    if len(body) > config.max_body_bytes:
        raise ApiError(413, "body_too_large", f"unpacked, the body has more than {config.max_body_bytes} bytes")
    if not unpacking.eof or unpacking.unused_data:
        raise ApiError(400, "bad_request", f"body: its {encoding} does not end where the body ends")
    return body


def error_response(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error in the shape that all of them have."""
    if status == 503:
        headers = {"Retry-After": RETRY_AFTER_SECONDS}
    message = message if len(message) <= MAX_MESSAGE_CHARACTERS else message[:MAX_MESSAGE_CHARACTERS] + " ..."
    return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=headers)


_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_HEALTH = ("/healthz", "/readyz")
_OPERATIONAL = (*_HEALTH, "/metrics")


def _counting(connections: Connections) -> Any:
    """Make the middleware that marks a connection as one with a request in hand."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        with connections.in_hand(request.transport):
            return await handler(request)

    return middleware


def _handling_errors(max_concurrent_requests: int) -> Any:
    """Make the middleware that bounds concurrent requests and turns every error into one JSON shape."""
    in_hand = 0

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal in_hand
        if in_hand >= max_concurrent_requests and request.path not in _OPERATIONAL:
            return error_response(503, "overloaded", f"{max_concurrent_requests} requests are in hand; try again")
        in_hand += 1
        try:
            return await handler(request)
        except ApiError as error:
            return error_response(error.status, error.code, error.message, error.headers)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = error_response(error.status, _CODES.get(error.status, "bad_request"), error.reason)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response
        except Unprocessable as error:
            return error_response(422, error.reason.value, error.detail)
        except StoreBusy as error:
            log.warning("serve.overloaded", error=str(error))
            return error_response(503, "overloaded", f"too many requests wait for {error.what}; try again")
        except Unavailable as error:
            log.warning("serve.unavailable", error=str(error))  # addresses and settings stay out of the answer
            return error_response(503, "unavailable", f"{error.what} does not answer now; try again")
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception:
            log.exception("serve.failed", route=_route(request))
            return error_response(500, "internal", "this request failed; the reason is in the server's log")
        finally:
            in_hand -= 1

    return middleware


def _admitting(config: ServeConfig) -> Any:
    """Make the middleware that checks token and rate before the body is read."""
    tokens = BearerTokens([token.get_secret_value() for token in config.tokens])
    limiter = RateLimiter(config.max_requests_per_second, config.burst_requests, time.monotonic)

    def count(client: str) -> None:
        if wait := limiter.wait_seconds(client):
            headers = {"Retry-After": str(math.ceil(wait))}
            raise ApiError(429, "too_many_requests", "this client asks too often", headers)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _HEALTH:
            return await handler(request)
        token = tokens.recognise(request.headers.get("Authorization"))
        address = f"address {request.remote}"
        if tokens.required and token is None:
            count(address)  # guesses count too
            raise ApiError(401, "unauthorized", "give a bearer token", {"WWW-Authenticate": "Bearer"})
        count(address if token is None else f"token {token}")
        return await handler(request)

    return middleware


def _reporting(on_report: Callable[[object], None]) -> Any:
    """Make the middleware that reports each request."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        response = await handler(request)
        on_report(RequestReport(_route(request), response.status, time.perf_counter() - started))
        return response

    return middleware


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"
