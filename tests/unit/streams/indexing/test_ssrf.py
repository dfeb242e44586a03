"""Hostile picture URLs, against two real servers: `outer`, which may be asked, and `inner`, which never may.

`inner` listens on every address of this machine and counts the connections it accepts, so what a test says of it is
what it saw itself. A control asks it by the same URL the way a careless client would, and gets through.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Network
from urllib.parse import urljoin, urlsplit

import pytest
from yarl import URL

from schemas.errors import ContentUnavailable, Reason, Unprocessable
from streams.indexing.addresses import is_public
from streams.indexing.image_fetch import ImageFetchConfig, ImageFetcher
from tests.factories.dns import FakeResolver, RebindingResolver
from tests.factories.hostile_urls import (
    BAD_REDIRECTS,
    ELSEWHERE,
    INSIDE_NAMES,
    NAMES,
    OUTER,
    REACHING,
    REDIRECTS,
    REFUSED,
)

PICTURE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100
HAS_V6 = socket.has_dualstack_ipv6()
GUARDED = ImageFetchConfig(private_networks=(IPv4Network(f"{OUTER}/32"),), allowed_ports=(), timeout_seconds=3)


class Inner:
    """Whatever reaches it is counted as it is accepted, before a byte is read."""

    def __init__(self) -> None:
        self.port = 0
        self.accepted = 0
        self.open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open.add(writer)
        with suppress(ConnectionError):
            await reader.read(65_536)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE)
            await writer.drain()
        writer.close()


class Outer(Inner):
    """`/hop/N` redirects as the test says; other paths answer as their name says."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.hops: list[tuple[int, str]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                target = head.split(" ")[1]
                self.asked.append(target)
                await self.answer(target, writer)
                await writer.drain()
        writer.close()

    async def answer(self, target: str, writer: asyncio.StreamWriter) -> None:
        path = target.partition("?")[0]
        if path.startswith("/hop/"):
            status, where = self.hops[int(path[5:])]
            writer.write(self.head(status, f"Location: {where}"))
        elif path == "/loop":
            writer.write(self.head(302, f"Location: http://{OUTER}:{self.port}/loop"))
        elif path == "/refresh":
            writer.write(self.head(200, f"Refresh: 0; url=http://127.0.0.1:{self.port}/", body=PICTURE))
        elif path == "/drip":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + PICTURE[:8])
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif path == "/drip-head":
            writer.write(b"HTTP/1.1 200 OK\r\n")
            for n in range(10_000):
                writer.write(b"X-%d: y\r\n" % n)
                await writer.drain()
                await asyncio.sleep(0.05)
        elif path == "/packed":
            writer.write(self.head(200, "Content-Encoding: gzip", body=gzip.compress(bytes(50_000_000))))
        elif path == "/many-heads":
            writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"y" * 1_000_000 + b"\r\n\r\n")
        elif path == "/lie":
            writer.write(self.head(200, "Content-Type: text/html", body=PICTURE))
        elif path.startswith("/body/"):
            writer.write(self.head(200, "Content-Type: image/png", body=BODIES[path[6:]]))
        else:
            writer.write(self.head(200, "Content-Type: image/png", body=PICTURE))

    def head(self, status: int, *lines: str, body: bytes = b"") -> bytes:
        text = "\r\n".join([f"HTTP/1.1 {status} X", *lines, f"Content-Length: {len(body)}", "", ""])
        return text.encode("latin-1", "replace") + body


BODIES = {
    "page": b"<!DOCTYPE html><title>secret of the inside</title>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>',
    "json": b'{"AccessKeyId": "secret"}',
    "avif": b"\0\0\0\x20ftypavif" + bytes(100),
    "tiff": b"II*\0" + bytes(100),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(100),
    "short": b"\x89P",
}


@asynccontextmanager
async def listening(server: Inner, address: str) -> AsyncIterator[None]:
    if address == "::" and HAS_V6:
        socket_ = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        socket_ = socket.create_server(("" if address == "::" else address, 0))
    running = await asyncio.start_server(server.serve, sock=socket_)
    server.port = socket_.getsockname()[1]
    yield
    running.close()
    for writer in server.open:
        writer.transport.abort()
    await asyncio.sleep(0)


@pytest.fixture
async def inner() -> AsyncIterator[Inner]:
    server = Inner()
    async with listening(server, "::"):
        yield server


@pytest.fixture
async def outer() -> AsyncIterator[Outer]:
    server = Outer()
    async with listening(server, OUTER):
        yield server


def at(template: str, inner: Inner, outer: Outer) -> str:
    return template.replace("${I}", str(inner.port)).replace("${O}", str(outer.port))


def lead(outer: Outer, inner: Inner, hops: list[tuple[int, str]]) -> str:
    """Have `outer` redirect so; returns where to begin."""
    base = f"http://{OUTER}:{outer.port}/hop/"
    outer.hops = [
        (status, at(where, inner, outer).replace("${H}", f"{base}{n}")) for n, (status, where) in enumerate(hops, 1)
    ]
    return base + "0"


def resolver() -> FakeResolver:
    return FakeResolver(NAMES, ask_system=True)


async def got(fetcher: ImageFetcher, url: str) -> bytes:
    async with fetcher.picture(url) as picture:
        return picture


async def fetch(url: str, config: ImageFetchConfig = GUARDED) -> bytes:
    async with ImageFetcher(config, resolver=resolver) as fetcher:
        return await got(fetcher, url)


async def why_not(url: str, config: ImageFetchConfig = GUARDED) -> Reason | None:
    """The reason why a URL is not fetched; None if it may be fetched later."""
    try:
        got = await fetch(url, config)
    except Unprocessable as error:
        if "secret" in error.detail:
            raise AssertionError(f"what was read is repeated: {error}") from error
        return error.reason
    except ContentUnavailable:
        return None
    raise AssertionError(f"{url} was fetched: {got[:40]!r}")


async def careless(url: str, hops: int = 5) -> None:
    """Fetch as a client would that believes whatever it is told."""
    for _ in range(hops):
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
        host = host.removesuffix(".")
        address = min(NAMES.get(host, [host]), key=lambda found: found == OUTER)
        reader, writer = await asyncio.open_connection(address, parts.port)
        writer.write(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.close()
        if "Location: " not in head:
            return
        url = urljoin(url, head.split("Location: ")[1].split("\r\n")[0])


def leads_by_v6(url: str) -> bool:
    return "[" in url or any(":" in address for address in NAMES.get(urlsplit(url).hostname or "", []))


def test_there_are_enough_of_them() -> None:
    assert len(set(REACHING)) == len(REACHING) >= 50
    assert len(REACHING) + len(REDIRECTS) + len(set(REFUSED)) + len(BAD_REDIRECTS) >= 125


@pytest.mark.parametrize("template", REACHING)
async def test_a_url_by_which_a_careless_client_gets_inside_does_not_get_there(
    template: str, inner: Inner, outer: Outer
) -> None:
    url = at(template, inner, outer)
    assert await why_not(url) is Reason.IMAGE_REFUSED
    assert inner.accepted == 0
    if HAS_V6 or not leads_by_v6(url):
        await careless(url)
        assert inner.accepted == 1


@pytest.mark.parametrize("hops", REDIRECTS, ids=repr)
async def test_a_redirect_that_leads_a_careless_client_inside_does_not_lead_there(
    hops: list[tuple[int, str]], inner: Inner, outer: Outer
) -> None:
    url = lead(outer, inner, hops)
    assert await why_not(url) is Reason.IMAGE_REFUSED
    assert len(outer.asked) == len(hops)
    assert inner.accepted == 0
    if HAS_V6 or not leads_by_v6(outer.hops[-1][1]):
        await careless(url)
        assert inner.accepted == 1


@pytest.mark.parametrize("where", BAD_REDIRECTS)
async def test_a_redirect_to_what_is_no_public_http_url_is_refused(where: str, inner: Inner, outer: Outer) -> None:
    assert await why_not(lead(outer, inner, [(302, where)])) in (Reason.IMAGE_REFUSED, Reason.BAD_IMAGE)
    assert inner.accepted == 0


@pytest.mark.parametrize("template", REFUSED)
async def test_what_is_no_public_http_url_is_refused(template: str, inner: Inner, outer: Outer) -> None:
    assert await why_not(at(template, inner, outer)) is Reason.IMAGE_REFUSED
    assert inner.accepted == 0


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "inside.test", *(["[::1]", "[::ffff:127.0.0.1]", "v6.test"] if HAS_V6 else [])]
)
async def test_control_where_inside_is_allowed_the_same_server_is_reached(host: str, inner: Inner) -> None:
    allowed = GUARDED.model_validate({"private_networks": ["127.0.0.0/8", "::1/128"], "allowed_ports": []})
    assert await fetch(f"http://{host}:{inner.port}/x", allowed) == PICTURE
    assert inner.accepted == 1


async def test_control_outer_is_reached_by_address_by_name_and_by_redirect(outer: Outer) -> None:
    for host in (OUTER, "outer.test", "OUTER.test", "outer.test."):
        assert await fetch(f"http://{host}:{outer.port}/x") == PICTURE
    outer.hops = [(302, f"http://outer.test:{outer.port}/hop/1"), (307, "/hop/2"), (301, "/x")]
    assert await fetch(f"http://{OUTER}:{outer.port}/hop/0") == PICTURE


async def test_only_the_usual_ports_are_asked_unless_others_are_listed(inner: Inner, outer: Outer) -> None:
    usual = GUARDED.model_copy(update={"allowed_ports": ImageFetchConfig().allowed_ports})
    assert await why_not(f"http://{OUTER}:{outer.port}/x", usual) is Reason.IMAGE_REFUSED
    assert await why_not(f"http://{OUTER}:22/x", usual) is Reason.IMAGE_REFUSED
    assert outer.asked == []
    listed = GUARDED.model_copy(update={"allowed_ports": (outer.port,)})
    assert await fetch(f"http://{OUTER}:{outer.port}/x", listed) == PICTURE
    outer.hops = [(302, f"http://{OUTER}:{inner.port}/x")]
    assert await why_not(f"http://{OUTER}:{outer.port}/hop/0", listed) is Reason.IMAGE_REFUSED
    assert inner.accepted == 0


async def test_where_only_https_is_allowed_http_is_not_asked(outer: Outer) -> None:
    safe = GUARDED.model_copy(update={"allowed_schemes": ("https",)})
    assert await why_not(f"http://{OUTER}:{outer.port}/x", safe) is Reason.IMAGE_REFUSED
    assert outer.asked == []


async def test_a_name_that_changes_between_the_look_and_the_connection_leads_nowhere_else(
    inner: Inner, outer: Outer
) -> None:
    (inside,) = NAMES["inside.test"]
    resolver = RebindingResolver("changing.test", first=OUTER, afterwards=inside)
    for port in (outer.port, inner.port):
        async with ImageFetcher(GUARDED, resolver=lambda: resolver) as fetcher:
            with suppress(Unprocessable):
                await got(fetcher, f"http://changing.test:{port}/x")
    assert outer.asked == ["/x"]
    assert resolver.asked == ["changing.test"] * 2
    assert inner.accepted == 0


async def test_the_socket_itself_is_the_last_guard(inner: Inner) -> None:
    class Blind(ImageFetcher):
        def _check(self, where: URL) -> None:
            """What if a URL slips through the look at it."""

    async with Blind(GUARDED, resolver=resolver) as fetcher:
        for host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"):
            with pytest.raises(Unprocessable, match="not a public address"):
                await got(fetcher, f"http://{host}:{inner.port}/x")
    assert inner.accepted == 0


async def test_a_loop_of_redirects_ends_after_three(outer: Outer) -> None:
    assert await why_not(f"http://{OUTER}:{outer.port}/loop") is Reason.IMAGE_REFUSED
    assert len(outer.asked) == 4


async def test_only_a_redirect_redirects(outer: Outer) -> None:
    assert await fetch(f"http://{OUTER}:{outer.port}/refresh") == PICTURE
    for status in (300, 304, 305, 201):
        outer.hops = [(status, "/x")]
        assert await why_not(f"http://{OUTER}:{outer.port}/hop/0") is None
    assert "/x" not in outer.asked


@pytest.mark.parametrize("path", ["drip", "drip-head"])
async def test_a_body_or_a_head_that_drips_costs_no_more_than_the_budget(path: str, outer: Outer) -> None:
    hurried = GUARDED.model_copy(update={"timeout_seconds": 0.3})
    async with asyncio.timeout(20):
        assert await why_not(f"http://{OUTER}:{outer.port}/{path}", hurried) is None


async def test_a_head_without_end_is_not_kept(outer: Outer) -> None:
    assert await why_not(f"http://{OUTER}:{outer.port}/many-heads") is None


async def test_packed_content_is_not_unpacked(outer: Outer) -> None:
    assert await why_not(f"http://{OUTER}:{outer.port}/packed") is Reason.BAD_IMAGE


@pytest.mark.parametrize("body", BODIES)
async def test_what_is_no_picture_is_refused_whatever_its_type_says_and_not_repeated(body: str, outer: Outer) -> None:
    reason = None if body == "page" else Reason.BAD_IMAGE  # an error page may be gone the next time
    assert await why_not(f"http://{OUTER}:{outer.port}/body/{body}") is reason


async def test_a_picture_is_one_whatever_its_type_says(outer: Outer) -> None:
    assert await fetch(f"http://{OUTER}:{outer.port}/lie") == PICTURE


def test_public_addresses_are_public() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"):
        assert is_public(address)
    for addresses in [*ELSEWHERE.values(), *INSIDE_NAMES.values()]:
        assert not all(is_public(address) for address in addresses)
