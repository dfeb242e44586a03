"""Pictures by URL, from the open internet: bounded in bytes and time, and never from inside our own network.

A product's picture URL is untrusted text. Scheme, port and host must be allowed, every address that its host resolves
to is checked, the very address that was checked is the one connected to, and each redirect starts over. The last check
is at the socket itself, however the address was found.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override
from yarl import URL

from encoders.image_formats import SNIFFED_BYTES, sniff
from schemas.errors import ContentUnavailable, Reason, Unprocessable
from streams.indexing.addresses import is_address, is_allowed, is_name

MAX_REDIRECTS = 3
MAX_QUIET_HOSTS = 10_000
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE_FOR_GOOD = frozenset({400, 401, 403, 405, 406, 410, 414, 451})
"""Answers that waiting does not change. 404 is not among them: a picture is often uploaded after its item."""


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
    max_bytes: int = Field(default=16 * 1024 * 1024, ge=1_024)
    """Largest picture that is fetched, in bytes."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """How long one fetch may take, redirects included."""
    concurrency: int = Field(default=16, ge=1, le=512)
    """Fetches under way at the same time, and as many late ones beside them."""
    quiet_host_seconds: float = Field(default=10.0, ge=0)
    """How long a host that did not answer is left alone by those in a hurry."""


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
        self._clock = clock
        self._quiet_until: dict[str, float] = {}
        self._make_resolver = resolver or aiohttp.ThreadedResolver
        self._slots = asyncio.Semaphore(config.concurrency)
        self._patient_slots = asyncio.Semaphore(config.concurrency)  # apart: slow retries must not keep batches out
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
            headers={"User-Agent": "mimstream", "Accept": "image/*", "Accept-Encoding": "identity"},
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

    async def fetch(self, url: str, *, timeout_seconds: float | None = None) -> bytes:
        """Get the picture behind `url`: bytes that begin like one of the formats that are decoded, whatever the server
        gives as content type.

        With a `timeout_seconds`, a host that lately did not answer is not asked again, so that a dead host costs one
        batch its budget and not each batch. Without, it always is.

        Raises `ContentUnavailable` for what may be had later, and `Unprocessable` (`IMAGE_REFUSED`, `IMAGE_TOO_LARGE`
        or `BAD_IMAGE`) for what may not.
        """
        budget = timeout_seconds or self._config.timeout_seconds
        slots = self._patient_slots if timeout_seconds is None else self._slots
        if timeout_seconds is not None and self._is_quiet(url):
            raise ContentUnavailable(url, "its host did not answer a moment ago")
        began = False
        try:
            async with asyncio.timeout(budget), slots:
                began = True
                picture = await self._follow(url)
            self._quiet_until.pop(_host_of(url), None)
            return picture
        except TimeoutError:
            if began:
                self._leave_alone(url)
            raise ContentUnavailable(url, f"no picture within {budget:g} s") from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, RefusedAddressError):
                raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: {error.os_error}") from error
            self._leave_alone(url)
            raise ContentUnavailable(url, str(error)) from error
        except RefusedAddressError as error:
            raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: {error}") from error
        except (aiohttp.InvalidURL, ValueError) as error:
            raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: not a usable URL ({error})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ContentUnavailable(url, repr(error)) from error

    def _is_quiet(self, url: str) -> bool:
        host = _host_of(url)
        if self._quiet_until.get(host, 0.0) > self._clock():
            return True
        self._quiet_until.pop(host, None)
        return False

    def _leave_alone(self, url: str) -> None:
        if len(self._quiet_until) >= MAX_QUIET_HOSTS:
            self._quiet_until.clear()
        self._quiet_until[_host_of(url)] = self._clock() + self._config.quiet_host_seconds

    async def _follow(self, url: str) -> bytes:
        assert self._session is not None, "use the fetcher as a context manager"
        where = URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            self._check(where)
            async with self._session.get(where, allow_redirects=False, timeout=_NO_SECOND_TIMEOUT) as answer:
                if answer.status in _REDIRECTS and "Location" in answer.headers:
                    where = where.join(URL(answer.headers["Location"]))
                    continue
                if answer.status in _GONE_FOR_GOOD:
                    raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: answered {answer.status}")
                if answer.status != 200:
                    raise ContentUnavailable(url, f"answered {answer.status}")
                return await self._read(url, answer)
        raise Unprocessable(Reason.IMAGE_REFUSED, f"{url}: more than {MAX_REDIRECTS} redirects")

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
        if (answer.content_length or 0) > self._config.max_bytes:
            raise self._too_large(url)
        body = bytearray()
        async for chunk in answer.content.iter_chunked(65_536):
            body += chunk
            if len(body) > self._config.max_bytes:
                raise self._too_large(url)
            if len(body) >= SNIFFED_BYTES and sniff(body[:SNIFFED_BYTES]) is None:
                break
        if not body:
            raise ContentUnavailable(url, "answered without content")
        if sniff(body[:SNIFFED_BYTES]) is None:
            raise Unprocessable(Reason.BAD_IMAGE, f"{url}: what it answers is not a JPEG, PNG or WebP")
        return bytes(body)

    def _too_large(self, url: str) -> Unprocessable:
        return Unprocessable(
            Reason.IMAGE_TOO_LARGE, f"{url}: more than {self._config.max_bytes} bytes (MIM_IMAGES__MAX_BYTES)"
        )


_NO_SECOND_TIMEOUT: Any = aiohttp.ClientTimeout(total=None)


def _host_of(url: str) -> str:
    try:
        return URL(url).host or ""
    except ValueError:
        return ""


def _matches(host: str, rule: str) -> bool:
    rule = rule.lower()
    return host.endswith(rule) if rule.startswith(".") else host == rule
