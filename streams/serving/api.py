"""The HTTP interface: scores, neighbours, items, health.

    POST /v1/score          probabilities for a user's candidates
    POST /v1/similar        nearest items of an item, a batch of items, a text or a picture
    GET  /v1/items/{id}     the item's row in the center (`?vector=1` with its vector)
    GET  /healthz           the process is alive
    GET  /readyz            whether it can score; if not, why
    GET  /metrics           Prometheus

With `MIM_SERVE__TOKENS` all but the two health checks need `Authorization: Bearer TOKEN`.

Errors are `{"error": {"code", "message"}}`. Scores use cached vectors (`serving/vector_cache.py` says how old these may
be); neighbours and items are read from the center itself. Queries are encoded in threads, off the loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import orjson
import structlog
from aiohttp import web
from numpy.typing import NDArray
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from encoders.base import Encoder, ItemContent
from schemas.base import MAX_ID_CHARACTERS, Message
from schemas.errors import Misconfigured, PipelineError, Unavailable, Unprocessable
from schemas.scoring import ItemView, Neighbour, ScoreRequest, SimilarRequest, SimilarResponse, SimilarResult
from streams.serving.auth import BearerTokens, RateLimiter
from streams.serving.config import ServeConfig
from streams.serving.model_watcher import ModelWatcher, ServedModel
from streams.serving.reports import RequestReport
from streams.serving.vector_cache import VectorCache
from streams.stores.histories.store import BehaviourStore
from streams.stores.vectors.item_index import ItemIndex
from trainer.networks.item_rows import ItemRows

log = structlog.get_logger()

M = TypeVar("M", bound=Message)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RETRY_AFTER_SECONDS = "1"


class ApiError(Exception):
    """An error that the handlers of requests raise, with its HTTP status and code."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


class QueryEncoder(Protocol):
    """The encoder of queries, loaded at the first use."""

    async def get(self) -> Encoder:
        """The encoder. Raises `Misconfigured` if it cannot be loaded or is not the center's."""
        ...


@dataclass(frozen=True)
class ScoringService:
    """The collaborators of all requests."""

    config: ServeConfig
    vector_cache: VectorCache
    index: ItemIndex
    behaviours: BehaviourStore
    models: ModelWatcher
    encoder: QueryEncoder
    encoder_version: str
    compute: ThreadPoolExecutor
    on_report: Callable[[object], None]
    """Receives every `RequestReport` and `CacheReport`."""
    metrics_page: Callable[[], bytes]
    """Renders `GET /metrics`, in the text format of Prometheus."""


SERVICE = web.AppKey("service", ScoringService)


def make_app(service: ScoringService) -> web.Application:
    """Assemble the routes. The caller opens and closes the collaborators."""
    config = service.config
    middlewares = [_reporting(service.on_report), _handling_errors(config.max_concurrent_requests)]
    if config.tokens or config.max_requests_per_second is not None:
        middlewares.append(_admitting(config))
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=middlewares)
    app[SERVICE] = service
    app.router.add_post("/v1/score", score)
    app.router.add_post("/v1/similar", similar)
    app.router.add_get("/v1/items/{item_id}", show_item)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


async def score(request: web.Request) -> web.Response:
    """`POST /v1/score`."""
    service = request.app[SERVICE]
    asked = await _body(request, ScoreRequest)
    model = service.models.current  # one model for the whole request, whatever is swapped meanwhile
    if model is None:
        reason = service.models.problem or "no model has been released yet"
        log.debug("serve.no_model", reason=reason)
        raise ApiError(503, "no_model", "no model has been released yet; /v1/similar works without one")
    history = await service.behaviours.taken_items(asked.user_id)
    deleted = service.vector_cache.deleted
    if deleted:
        history = [item_id for item_id in history if item_id not in deleted]
    history = history[-model.scorer.history_length :]
    related = [*asked.item_ids, *history, *([asked.trigger_item] if asked.trigger_item else [])]
    lookup = await service.vector_cache.look_up(related)
    service.on_report(lookup.report)
    # here rather than in a thread: a pass is hundreds of short operations, after each of which a thread would have to
    # win the interpreter back from this loop; measured, that costs more than the concurrency gains
    probabilities = model.scorer.score(lookup.items, len(asked.item_ids))
    if deleted:
        probabilities[[number for number, item_id in enumerate(asked.item_ids) if item_id in deleted]] = np.nan
    return _answer(_scored(model, probabilities, lookup.items, len(history)))


def _scored(model: ServedModel, probabilities: NDArray[np.float64], items: ItemRows, history_length: int) -> bytes:
    """A `ScoreResponse` as JSON: its validation would cost a fifth of a request."""
    has_vector = items.has_vector_U[1 : len(probabilities) + 1].tolist()
    rows = zip(items.item_ids, probabilities.tolist(), has_vector, strict=False)  # the history follows
    return orjson.dumps(  # a NaN becomes null
        {
            "scores": [
                {"item_id": item_id, "probability": probability, "has_vector": has_vector}
                for item_id, probability, has_vector in rows
            ],
            "release_id": model.manifest.release_id,
            "weights_sha256": model.manifest.weights_sha256,
            "encoder_version": model.manifest.encoder_version,
            "history_length": history_length,
        }
    )


async def similar(request: web.Request) -> web.Response:
    """`POST /v1/similar`."""
    service = request.app[SERVICE]
    asked = await _body(request, SimilarRequest)
    item_ids = asked.item_ids or ([asked.item_id] if asked.item_id is not None else None)
    if item_ids is not None:
        results = await _near_items(service, item_ids, asked)
        if asked.item_id is not None and not results[0].found:
            raise ApiError(404, "item_not_found", f"the center does not hold item {asked.item_id!r}")
    else:
        found = await service.index.search(await _encoded_query(service, asked), asked.k)
        results = [SimilarResult(query=None, found=True, neighbours=_neighbours(found[0]))]
    return _json(SimilarResponse(results=results, encoder_version=service.encoder_version))


async def _near_items(service: ScoringService, item_ids: list[str], asked: SimilarRequest) -> list[SimilarResult]:
    rows = await service.index.fetch(list(dict.fromkeys(item_ids)))
    held = {item_id: row.vector for item_id, row in rows.items() if row.encoder_version == service.encoder_version}
    near: dict[str, list[tuple[str, float]]] = {}
    if held:
        lists = await service.index.search(np.stack(list(held.values())), asked.k + (not asked.include_self))
        near = dict(zip(held, lists, strict=True))
    return [
        SimilarResult(
            query=item_id,
            found=item_id in held,
            neighbours=_neighbours(
                [pair for pair in near.get(item_id, []) if asked.include_self or pair[0] != item_id][: asked.k]
            ),
        )
        for item_id in item_ids
    ]


async def _encoded_query(service: ScoringService, asked: SimilarRequest) -> NDArray[np.float32]:
    try:
        encoder = await service.encoder.get()
    except Misconfigured as error:
        log.error("serve.no_query_encoder", error=str(error))
        raise ApiError(
            503, "no_query_encoder", "this server cannot encode queries; ask for the neighbours of an item"
        ) from None
    content = ItemContent(title=asked.text or "", image=asked.image)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(service.compute, lambda: encoder.encode([encoder.prepare(content)]))


def _neighbours(pairs: list[tuple[str, float]]) -> list[Neighbour]:
    return [Neighbour(item_id=item_id, similarity=max(-1.0, min(1.0, cosine))) for item_id, cosine in pairs]


async def show_item(request: web.Request) -> web.Response:
    """`GET /v1/items/{item_id}`."""
    service = request.app[SERVICE]
    item_id = request.match_info["item_id"]
    if len(item_id) > MAX_ID_CHARACTERS:
        raise ApiError(400, "bad_request", f"an item id has at most {MAX_ID_CHARACTERS} characters")
    row = (await service.index.fetch([item_id])).get(item_id)
    if row is None:
        raise ApiError(404, "item_not_found", f"the center does not hold item {item_id!r}")
    with_vector = request.query.get("vector") in ("1", "true")
    return _json(
        ItemView(
            item_id=row.item_id,
            encoder_version=row.encoder_version,
            content_hash=row.content_hash,
            published_at=row.published_at,
            category=row.category,
            price=row.price,
            has_title=row.has_title,
            has_image=row.has_image,
            source_partition=row.source_partition,
            source_offset=row.source_offset,
            vector=row.vector.tolist() if with_vector else None,
        )
    )


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`."""
    page = request.app[SERVICE].metrics_page()
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def healthz(request: web.Request) -> web.Response:
    """`GET /healthz`: the event loop runs."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """`GET /readyz`: 200 if every check is `ok`, else 503 with the reasons."""
    checks = await readiness(request.app[SERVICE])
    ready = all(state == "ok" for state in checks.values())
    return web.json_response({"ready": ready, "checks": checks}, status=200 if ready else 503)


async def readiness(service: ScoringService) -> dict[str, str]:
    """The dependencies of a score: `ok`, or why not, in words that may be shown outside."""

    async def probe(call: Awaitable[object], what: str) -> str:
        try:
            await asyncio.wait_for(call, service.config.ready_timeout_seconds)
        except (PipelineError, TimeoutError) as error:
            log.warning("serve.not_ready", what=what, error=str(error) or "timed out")
            return f"{what} does not answer"
        return "ok"

    behaviours, center = await asyncio.gather(
        probe(service.behaviours.ping(), "the behaviour store"),
        probe(service.index.fetch(["readiness probe"]), "the representation center"),
    )
    if service.models.current is not None:
        model = "ok"
    else:
        model = "the newest release cannot be used" if service.models.problem else "no model has been released yet"
    return {"behaviours": behaviours, "center": center, "model": model}


async def _body(request: web.Request, model: type[M]) -> M:
    """Read and validate a request. Raises `ApiError` naming each wrong field."""
    allowed_seconds = request.app[SERVICE].config.body_seconds
    arrived = request.content.is_eof()  # as a rule with its head: no timer is needed
    try:
        async with nullcontext() if arrived else asyncio.timeout(allowed_seconds):
            raw = await request.read()
    except TimeoutError:
        raise ApiError(408, "too_slow", f"the request did not arrive within {allowed_seconds:g} s") from None
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(str(part) for part in item['loc']) or 'body'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)[:5]
        ]
        raise ApiError(400, "bad_request", "; ".join(wrong)) from None


def _json(answer: Message) -> web.Response:
    return _answer(answer.model_dump_json().encode())


def _answer(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    if status == 503:
        headers = {"Retry-After": RETRY_AFTER_SECONDS}
    return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=headers)


_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_HEALTH = ("/healthz", "/readyz")
_OPERATIONAL = (*_HEALTH, "/metrics")


def _handling_errors(max_concurrent_requests: int) -> Any:
    """Make the middleware that bounds concurrent requests and turns every error into one JSON shape."""
    in_hand = 0

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal in_hand
        if in_hand >= max_concurrent_requests and request.path not in _OPERATIONAL:
            return _error(503, "overloaded", f"{max_concurrent_requests} requests are in hand; try again")
        in_hand += 1
        try:
            return await handler(request)
        except ApiError as error:
            return _error(error.status, error.code, error.message, error.headers)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = _error(error.status, _CODES.get(error.status, "bad_request"), error.reason)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response
        except Unprocessable as error:
            return _error(422, error.reason.value, error.detail)
        except Unavailable as error:
            log.warning("serve.unavailable", error=str(error))  # addresses and settings stay out of the answer
            return _error(503, "unavailable", f"{error.what} does not answer now; try again")
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception:
            log.exception("serve.failed", route=_route(request))
            return _error(500, "internal", "this request failed; the reason is in the server's log")
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
