"""Fetching pictures, against a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Network

import pytest
from aiohttp import web

from schemas.errors import ContentUnavailable, Reason, Unprocessable
from streams.indexing.addresses import is_public
from streams.indexing.image_fetch import ImageFetchConfig, ImageFetcher
from tests.factories.dns import FakeResolver, RebindingResolver

PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
PICTURE = PNG_BEGINS + b"and so on" * 100
LOOPBACK = IPv4Network("127.0.0.0/8")


class Site:
    """A server whose answers a test chooses."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[str] = []

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.lstrip("/")
        self.asked.append(path)
        if path.startswith("status/"):
            return web.Response(status=int(path.removeprefix("status/")))
        if path.startswith("hops/"):
            left = int(path.removeprefix("hops/"))
            return web.Response(status=302, headers={"Location": f"/hops/{left - 1}" if left else "/ok"})
        if path == "to":
            return web.Response(status=307, headers={"Location": request.query["where"]})
        if path == "slow":
            await asyncio.sleep(30)
        if path == "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(PNG_BEGINS)
            while True:
                await response.write(b"x" * 65_536)
        if path == "empty":
            return web.Response(body=b"")
        return web.Response(body=PICTURE, content_type="text/plain")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.port = runner.addresses[0][1]
    yield site
    await runner.cleanup()


INSIDE = ImageFetchConfig(private_networks=(LOOPBACK,), allowed_ports=(), timeout_seconds=2)
PUBLIC = ImageFetchConfig(allowed_ports=(), timeout_seconds=2)


async def fetch(url: str, config: ImageFetchConfig = INSIDE, names: FakeResolver | None = None) -> bytes:
    async with ImageFetcher(config, resolver=(lambda: names) if names else None) as fetcher:
        return await fetcher.fetch(url)


async def refused(url: str, config: ImageFetchConfig = INSIDE, names: FakeResolver | None = None) -> Reason:
    with pytest.raises(Unprocessable) as caught:
        await fetch(url, config, names)
    return caught.value.reason


async def test_a_picture_is_fetched_whatever_its_content_type_says(site: Site) -> None:
    assert await fetch(site.url("ok")) == PICTURE


async def test_three_redirects_are_followed_and_a_fourth_is_not(site: Site) -> None:
    assert await fetch(site.url("hops/2")) == PICTURE
    assert await refused(site.url("hops/3")) is Reason.IMAGE_REFUSED


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
async def test_an_answer_that_may_change_is_worth_another_try(site: Site, status: int) -> None:
    with pytest.raises(ContentUnavailable, match=str(status)):
        await fetch(site.url(f"status/{status}"))


@pytest.mark.parametrize("status", [401, 403, 410])
async def test_an_answer_that_will_not_change_is_final(site: Site, status: int) -> None:
    assert await refused(site.url(f"status/{status}")) is Reason.IMAGE_REFUSED


async def test_a_slow_server_costs_no_more_than_the_budget(site: Site) -> None:
    started = asyncio.get_running_loop().time()
    async with ImageFetcher(INSIDE) as fetcher:
        with pytest.raises(ContentUnavailable, match=r"0\.2 s"):
            await fetcher.fetch(site.url("slow"), timeout_seconds=0.2)
    assert asyncio.get_running_loop().time() - started < 1.5


async def test_a_host_that_does_not_answer_costs_those_in_a_hurry_only_once(site: Site) -> None:
    now = [0.0]
    async with ImageFetcher(INSIDE, clock=lambda: now[0]) as fetcher:

        async def hurried() -> None:
            with pytest.raises(ContentUnavailable):
                await fetcher.fetch(site.url("slow"), timeout_seconds=0.05)

        await hurried()
        await hurried()
        assert site.asked == ["slow"]
        now[0] += INSIDE.quiet_host_seconds
        await hurried()
        assert site.asked == ["slow", "slow"]
        assert await fetcher.fetch(site.url("ok")) == PICTURE  # without a hurry it is asked all the same
        assert await fetcher.fetch(site.url("ok"), timeout_seconds=1) == PICTURE  # and what answered is not quiet


async def test_late_pictures_do_not_keep_those_in_a_hurry_out(site: Site) -> None:
    async with ImageFetcher(INSIDE.model_copy(update={"concurrency": 2})) as fetcher:
        late = [asyncio.create_task(fetcher.fetch(site.url("slow"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert await fetcher.fetch(site.url("ok"), timeout_seconds=0.5) == PICTURE
        outcomes = await asyncio.gather(*late, return_exceptions=True)
    assert all(isinstance(outcome, ContentUnavailable) for outcome in outcomes)


async def test_an_answer_that_is_no_picture_does_not_make_a_host_quiet(site: Site) -> None:
    async with ImageFetcher(INSIDE) as fetcher:
        with pytest.raises(ContentUnavailable):
            await fetcher.fetch(site.url("status/404"), timeout_seconds=1)
        assert await fetcher.fetch(site.url("ok"), timeout_seconds=1) == PICTURE


async def test_a_body_without_end_stops_at_the_cap(site: Site) -> None:
    capped = INSIDE.model_copy(update={"max_bytes": 500_000})
    assert await refused(site.url("endless"), capped) is Reason.IMAGE_TOO_LARGE


async def test_a_declared_length_above_the_cap_is_refused(site: Site) -> None:
    small = INSIDE.model_copy(update={"max_bytes": len(PICTURE) - 1})
    assert await refused(site.url("ok"), small) is Reason.IMAGE_TOO_LARGE
    assert await fetch(site.url("ok"), INSIDE.model_copy(update={"max_bytes": len(PICTURE)})) == PICTURE


async def test_a_closed_port_an_unknown_name_and_an_empty_body_are_worth_another_try(site: Site) -> None:
    for url in ("http://127.0.0.1:1/x", "http://nobody.test/x", site.url("empty")):
        with pytest.raises(ContentUnavailable):
            await fetch(url, names=FakeResolver({}))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.com/x", "http://", "nonsense", "http://user:pw@example.com/x", "http://[::1"],
)
async def test_only_plain_http_urls_are_fetched(url: str) -> None:
    assert await refused(url) is Reason.IMAGE_REFUSED


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "::",
        "ff02::1",
    ],
)
async def test_no_address_inside_is_asked_neither_literally_nor_by_name(site: Site, address: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    if "%" not in address:
        assert await refused(site.url("ok", literal), PUBLIC) is Reason.IMAGE_REFUSED
    names = FakeResolver({"shop.test": [address]})
    assert await refused(site.url("ok", "shop.test"), PUBLIC, names) is Reason.IMAGE_REFUSED
    assert names.asked == ["shop.test"]
    assert site.asked == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1"])
async def test_other_spellings_of_loopback_do_not_slip_through(site: Site, host: str) -> None:
    with pytest.raises((Unprocessable, ContentUnavailable)):
        await fetch(site.url("ok", host), PUBLIC)
    assert site.asked == []


async def test_one_inner_address_among_public_ones_refuses_the_name(site: Site) -> None:
    names = FakeResolver({"shop.test": ["93.184.216.34", "127.0.0.1"]})
    assert await refused(site.url("ok", "shop.test"), PUBLIC, names) is Reason.IMAGE_REFUSED


async def test_a_redirect_is_checked_like_a_first_request(site: Site) -> None:
    listed = INSIDE.model_copy(update={"allowed_hosts": ("127.0.0.1",)})
    inner = site.url("to") + "?where=http://localhost:1/x"
    assert await refused(inner, listed) is Reason.IMAGE_REFUSED
    assert await refused(site.url("to") + "?where=file:///etc/passwd") is Reason.IMAGE_REFUSED
    assert site.asked == ["to", "to"]


async def test_only_listed_hosts_are_asked_where_there_is_a_list(site: Site) -> None:
    config = INSIDE.model_copy(update={"allowed_hosts": ("cdn.test", ".img.test")})
    names = FakeResolver({host: ["127.0.0.1"] for host in ("cdn.test", "a.img.test", "evilimg.test", "xcdn.test")})
    assert await fetch(site.url("ok", "cdn.test"), config, names) == PICTURE
    assert await fetch(site.url("ok", "A.IMG.test"), config, names) == PICTURE
    for host in ("evilimg.test", "xcdn.test"):
        assert await refused(site.url("ok", host), config, names) is Reason.IMAGE_REFUSED


async def test_the_address_that_was_checked_is_the_one_connected_to(site: Site) -> None:
    names = RebindingResolver("shop.test", first="192.0.2.1", afterwards="127.0.0.1")
    with pytest.raises((Unprocessable, ContentUnavailable)):
        await fetch(site.url("ok", "shop.test"), PUBLIC.model_copy(update={"timeout_seconds": 0.5}), names)
    assert names.asked == ["shop.test"]
    assert site.asked == []


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")
    assert is_public("::ffff:93.184.216.34")
