"""Pictures by URL, from the open internet: bounded in bytes and time, and never from inside our own network.

A product's picture URL is untrusted text. Scheme, port and host must be allowed, every address that its host resolves
to is checked, the very address that was checked is the one connected to, and each redirect starts over. The last check
is at the socket itself, however the address was found.

Fetching is a stage of its own: requests wait for their turn (`fetch_limits.py`), and the time of one begins with it.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override
from yarl import URL

from encoders.image_formats import ACCEPT, FORMATS, SNIFFED_BYTES, is_page, other_format, sniff
from schemas.errors import Reason, Unprocessable
from streams.indexing.addresses import is_address, is_allowed, is_name
from streams.indexing.fetch_limits import ByteRoom, FetchFailed, Lane

MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE_FOR_GOOD = frozenset({400, 401, 405, 406, 410, 414, 451})
"""Answers that waiting does not change. 404 and 403 are not among them: a picture is often uploaded after its item, and
S3 answers 403 until then."""
_OVERLOADED = frozenset({429, 503})
_MOMENTARY = frozenset({500, 502, 503, 504})
_NEEDS_NO_QUOTING = re.compile(r"(?:[!#-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})*")
_PAGE_TYPES = ("text/html", "application/xhtml+xml")


class ImageFetchConfig(BaseModel):
    """How pictures are fetched by URL."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    allowed_schemes: tuple[Literal["http", "https"], ...] = ("http", "https")
    """Schemes of URLs that are fetched."""
    allowed_ports: tuple[int, ...] = (80, 443)
    """Ports that are asked. Empty: any."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that pictures may come from; `.example.com` stands for all below it. Empty: any public host."""
    private_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks inside that may be asked all the same, as `["10.2.0.0/16"]`. For shops that keep pictures inside; else
    no private, loopback, link-local, multicast or reserved address is."""
    max_bytes: int = Field(default=8_388_608, ge=1_024)
    """Largest picture that is fetched, in bytes. No more than `MIM_ENCODER__MAX_IMAGE_BYTES` is of use."""
    max_held_bytes: int = Field(default=268_435_456, ge=1_024)
    """Bytes of pictures in memory: being fetched, or waiting to be decoded. Above it fetching waits."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """How long a request for a late picture may take, redirects included."""
    concurrency: int = Field(default=256, ge=1, le=4_096)
    """Requests under way at the same time, and as many for late pictures beside them. Each needs a file descriptor."""
    host_concurrency: int = Field(default=128, ge=1, le=4_096)
    """Most requests under way at one host. It begins with 32 and follows the host's answers, from 4 up to this."""
    quiet_host_seconds: float = Field(default=10.0, ge=0)
    """How long a host is left alone that gave no answer to eight requests in a row."""


class RefusedAddressError(OSError):
    """A host resolved to an address that must not be connected to."""


class CheckingResolver(AbstractResolver):
    """Resolves, checks every address, and gives the connector only addresses that were checked."""

    def __init__(self, inner: AbstractResolver, allowed: Callable[[str], bool]) -> None:
        self._inner = inner
        self._allowed = allowed

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """One forbidden address among several refuses `host` as a whole."""
        found = await self._inner.resolve(host, port, family)
        for entry in found:
            if not self._allowed(entry["host"]):
                raise RefusedAddressError(f"{host} resolves to {entry['host']}, which is not a public address")
        return found

    @override
    async def close(self) -> None:
        await self._inner.close()


class ImageFetcher:
    """Fetches pictures. Use it as an asynchronous context manager, inside the running loop."""

    def __init__(
        self,
        config: ImageFetchConfig,
        *,
        resolver: Callable[[], AbstractResolver] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._make_resolver = resolver or aiohttp.ThreadedResolver
        # lanes of their own: slow retries must not keep batches out
        self._hurried, self._patient = (
            Lane(
                most=config.concurrency,
                most_per_host=min(config.concurrency, config.host_concurrency),
                quiet_seconds=config.quiet_host_seconds,
                tries=tries,
                clock=clock,
            )
            for tries in (2, 1)
        )
        self._room = ByteRoom(config.max_held_bytes)
        self._allowed = partial(is_allowed, inside=config.private_networks)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=CheckingResolver(self._make_resolver(), self._allowed),
                socket_factory=self._socket,
                limit=2 * self._config.concurrency,
                ttl_dns_cache=10,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "mimstream", "Accept": ACCEPT, "Accept-Encoding": "identity"},
            auto_decompress=False,  # a few packed bytes could become gigabytes before they are counted
            trust_env=False,  # a proxy would resolve the host itself, unseen
        )
        return self

    def _socket(self, where: aiohttp.AddrInfoType) -> socket.socket:
        """Make the socket for one address, which nothing changes between here and the connection."""
        family, kind, protocol, _, address = where
        if not self._allowed(str(address[0])):
            raise RefusedAddressError(f"{address[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    async def __aexit__(self, *exception: object) -> None:
        """Close the connection pool."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def picture(self, url: str, *, timeout_seconds: float | None = None) -> AsyncIterator[bytes]:
        """Get the picture behind `url`: bytes that begin like one of the formats that are decoded, whatever the server
        gives as content type. They count as held until the block ends.

        Without a `timeout_seconds` the picture is a late one, in a lane of its own. However long a request has to wait
        for its turn, its time begins with the turn.

        Raises `FetchFailed` for what may be had later, and `Unprocessable` (`IMAGE_REFUSED`, `IMAGE_TOO_LARGE` or
        `BAD_IMAGE`) for what may not.
        """
        lane = self._patient if timeout_seconds is None else self._hurried
        try:
            where = _as_written(url)
            self._check(where)
        except ValueError as error:
            raise _unusable(url, error) from error
        async with AsyncExitStack() as held:
            request = partial(self._request, url, where, timeout_seconds or self._config.timeout_seconds, held)
            yield await lane.ask(url, (where.raw_host or "").lower(), request)

    async def _request(self, url: str, where: URL, seconds: float, held: AsyncExitStack) -> bytes:
        """Request once; what is fetched is held by `held`."""
        try:
            async with AsyncExitStack() as mine, asyncio.timeout(seconds) as deadline:
                picture = await self._follow(url, where, mine, deadline)
                held.push_async_exit(mine.pop_all())
            return picture
        except TimeoutError:
            raise FetchFailed(url, f"no picture within {seconds:g} s", overload=True, again=True) from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, RefusedAddressError):
                raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: {error.os_error}") from error
            raise FetchFailed(url, str(error), overload=True) from error
        except RefusedAddressError as error:
            raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: {error}") from error
        except (aiohttp.InvalidURL, ValueError) as error:
            raise _unusable(url, error) from error
        except (aiohttp.ClientError, OSError) as error:
            raise FetchFailed(url, repr(error), again=True) from error

    async def _follow(self, url: str, where: URL, held: AsyncExitStack, deadline: asyncio.Timeout) -> bytes:
        assert self._session is not None, "use the fetcher as a context manager"
        for _ in range(MAX_REDIRECTS + 1):
            self._check(where)
            async with self._session.get(where, allow_redirects=False, timeout=_NO_SECOND_TIMEOUT) as answer:
                status = answer.status
                if status in _REDIRECTS and "Location" in answer.headers:
                    where = where.join(_as_written(answer.headers["Location"]))
                    continue
                if status in _GONE_FOR_GOOD:
                    raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: answered {status}")
                if status != 200:
                    again, overload = status in _MOMENTARY, status in _OVERLOADED
                    raise FetchFailed(url, f"answered {status}", overload=overload, again=again)
                if (answer.content_length or 0) > self._config.max_bytes:
                    raise self._too_large(url)
                await self._hold(answer.content_length or self._config.max_bytes, held, deadline)
                return await self._read(url, answer)
        raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: more than {MAX_REDIRECTS} redirects")

    async def _hold(self, size: int, held: AsyncExitStack, deadline: asyncio.Timeout) -> None:
        """Wait until there is room for `size` bytes; the time that it takes is not the request's."""
        loop, ends = asyncio.get_running_loop(), deadline.when()
        assert ends is not None
        left = ends - loop.time()
        deadline.reschedule(None)
        await held.enter_async_context(self._room.hold(size))
        deadline.reschedule(loop.time() + left)

    def _check(self, where: URL) -> None:
        host = (where.raw_host or "").lower()  # raw: just what will be resolved and connected to
        bare = host.removesuffix(".")
        if where.scheme not in self._config.allowed_schemes or not host:
            schemes = " and ".join(self._config.allowed_schemes)
            raise self._refused(where, f"only {schemes} URLs with a host are fetched")
        if where.user is not None or where.password is not None:
            raise self._refused(where, "a URL must not carry a login")
        if self._config.allowed_ports and where.port not in self._config.allowed_ports:
            raise self._refused(where, f"port {where.port} is not in MIM_IMAGES__ALLOWED_PORTS")
        if self._config.allowed_hosts and not any(_matches(bare, rule) for rule in self._config.allowed_hosts):
            raise self._refused(where, f"host {bare} is not in MIM_IMAGES__ALLOWED_HOSTS")
        if is_address(bare):  # never resolved, so the resolver does not see it
            if not self._allowed(bare):
                raise self._refused(where, f"{bare} is not a public address")
        elif not is_name(host):
            raise self._refused(where, f"{host} is neither a host's name nor an address in full")

    def _refused(self, where: URL, why: str) -> Unprocessable:
        shown = where.with_user(None) if where.host else where
        return Unprocessable(Reason.IMAGE_REFUSED, f"{shown}: {why}")

    async def _read(self, url: str, answer: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in answer.content.iter_chunked(65_536):
            body += chunk
            if len(body) > self._config.max_bytes:
                raise self._too_large(url)
            if len(body) >= SNIFFED_BYTES and sniff(body[:SNIFFED_BYTES]) is None:
                break
        if not body:
            raise FetchFailed(url, "answered without content", again=True)
        if sniff(body[:SNIFFED_BYTES]) is None:
            if is_page(body) or answer.content_type in _PAGE_TYPES:  # an error page, or one that tells to wait
                raise FetchFailed(url, "answered an HTML page in place of a picture")
            found = other_format(body)
            raise Unprocessable(Reason.BAD_IMAGE, f"{url}: a picture has to be a {FORMATS}; what it answers is {found}")
        return bytes(body)

    def _too_large(self, url: str) -> Unprocessable:
        return Unprocessable(
            Reason.IMAGE_TOO_LARGE, f"{url}: more than {self._config.max_bytes} bytes (MIM_IMAGES__MAX_BYTES)"
        )


_NO_SECOND_TIMEOUT: Any = aiohttp.ClientTimeout(total=None)


def _as_written(url: str) -> URL:
    """A URL as it stands, because the signature of a signed one covers how each character is written.

    One with characters that no URL may have, such as a space or a letter that is not ASCII, is quoted.
    """
    return URL(url, encoded=_NEEDS_NO_QUOTING.fullmatch(url) is not None)


def _unusable(url: str, error: Exception) -> Unprocessable:
    return Unprocessable(Reason.IMAGE_REFUSED, f"{url}: not a usable URL ({error})")


def _matches(host: str, rule: str) -> bool:
    rule = rule.lower()
    return host.endswith(rule) if rule.startswith(".") else host == rule
