"""Fetching pictures, against a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from urllib.parse import quote

import pytest
from aiohttp import web

from schemas.errors import ContentUnavailable, Reason, Unprocessable
from streams.indexing.addresses import is_public
from streams.indexing.fetch_limits import QUIET_AFTER, FetchFailed
from streams.indexing.image_fetch import ImageFetchConfig, ImageFetcher
from tests.factories.dns import FakeResolver, RebindingResolver
from tests.factories.waiting import until

PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
PICTURE = PNG_BEGINS + b"and so on" * 100
LOOPBACK, LOCAL = IPv4Network("127.0.0.0/8"), ["127.0.0.1"]


class Site:
    """A server whose answers a test chooses."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[str] = []
        self.written: list[str] = []
        """Path and query as they came."""
        self.headers: list[dict[str, str]] = []

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.lstrip("/")
        self.asked.append(path)
        self.written.append(request.raw_path)
        self.headers.append(dict(request.headers))
        if path.startswith("status/"):
            return web.Response(status=int(path.removeprefix("status/")))
        if path.startswith("hops/"):
            left = int(path.removeprefix("hops/"))
            return web.Response(status=302, headers={"Location": f"/hops/{left - 1}" if left else "/ok"})
        if path == "to":
            return web.Response(status=307, headers={"Location": request.query["where"]})
        if path == "flaky" and self.asked.count("flaky") == 1:
            return web.Response(status=500)
        if path.startswith("page"):
            if path == "page":
                return web.Response(body=b"\n<!DOCTYPE html><p>Soon", content_type="image/png")
            return web.Response(body=b"Soon", content_type=request.query.get("type", "text/html"))
        if path == "chunked":
            response = web.StreamResponse(headers={"Set-Cookie": "known=1"})
            await response.prepare(request)
            await response.write(PICTURE)
            return response
        if path == "late":
            await asyncio.sleep(0.1)
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


async def got(fetcher: ImageFetcher, url: str, **options: float) -> bytes:
    async with fetcher.picture(url, timeout_seconds=options.get("timeout_seconds")) as picture:
        return picture


async def fetch(url: str, config: ImageFetchConfig = INSIDE, names: FakeResolver | None = None) -> bytes:
    async with ImageFetcher(config, resolver=(lambda: names) if names else None) as fetcher:
        return await got(fetcher, url)


async def refused(url: str, config: ImageFetchConfig = INSIDE, names: FakeResolver | None = None) -> Reason:
    with pytest.raises(Unprocessable) as caught:
        await fetch(url, config, names)
    return caught.value.reason


async def test_a_picture_is_fetched_whatever_its_content_type_says(site: Site) -> None:
    assert await fetch(site.url("ok")) == PICTURE


async def test_three_redirects_are_followed_and_a_fourth_is_not(site: Site) -> None:
    assert await fetch(site.url("hops/2")) == PICTURE
    assert await refused(site.url("hops/3")) is Reason.IMAGE_REFUSED


@pytest.mark.parametrize(
    ("path", "overload", "again"),
    [
        *((f"status/{status}", False, False) for status in (204, 402, 403, 404, 408, 418, 501)),
        *((f"status/{status}", False, True) for status in (500, 502, 504)),
        ("status/429", True, False),
        ("status/503", True, True),
        ("slow", True, True),
        ("empty", False, True),
        ("page", False, False),
    ],
)
async def test_an_answer_that_may_change_is_worth_another_try_and_tells_whether_the_host_has_too_much_to_do(
    site: Site, path: str, overload: bool, again: bool
) -> None:
    with pytest.raises(FetchFailed) as caught:
        await fetch(site.url(path), INSIDE.model_copy(update={"timeout_seconds": 0.3}))
    assert (caught.value.overload, caught.value.again) == (overload, again)
    assert len(site.asked) == 1  # a late picture is asked for once at a time


async def test_a_host_that_nobody_can_connect_to_has_too_much_to_do(unused_tcp_port: int) -> None:
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"http://127.0.0.1:{unused_tcp_port}/x")
    assert (caught.value.overload, caught.value.again) == (True, False)


@pytest.mark.parametrize("status", [400, 401, 405, 406, 410, 414, 451])
async def test_an_answer_that_will_not_change_is_final(site: Site, status: int) -> None:
    assert await refused(site.url(f"status/{status}")) is Reason.IMAGE_REFUSED


@pytest.mark.parametrize("path", ["page", "page-by-type", "page-by-type?type=application/xhtml%2Bxml"])
async def test_a_page_in_place_of_a_picture_is_worth_another_try(site: Site, path: str) -> None:
    with pytest.raises(ContentUnavailable, match="HTML page"):
        await fetch(site.url(path))


async def test_a_failure_of_the_moment_is_asked_again_at_once_and_only_once(site: Site) -> None:
    async with ImageFetcher(INSIDE) as fetcher:
        assert await got(fetcher, site.url("flaky"), timeout_seconds=1) == PICTURE
        with pytest.raises(ContentUnavailable):
            await got(fetcher, site.url("status/500"), timeout_seconds=1)
    assert site.asked == ["flaky", "flaky", "status/500", "status/500"]


SIGNED = "a%2Fb%3Ac%7Ed%2Ce.png?X-Amz-Credential=K%2F2026%2Fs3&X-Amz-Signature=a%2Bb%3D&tag=%7E"


async def test_a_signed_url_is_asked_as_it_is_written_after_a_redirect_too(site: Site) -> None:
    await fetch(site.url(SIGNED))
    await fetch(site.url("to?where=" + quote(f"/{SIGNED}", safe="")))
    assert (site.written[0], site.written[-1]) == (f"/{SIGNED}", f"/{SIGNED}")


async def test_characters_that_no_url_may_have_are_quoted(site: Site) -> None:
    await fetch(site.url("größe 1.png\r\nX-Evil: 1"))
    (written,) = site.written
    assert written.startswith("/gr%C3%B6%C3%9Fe%201.png") and "\n" not in written


async def test_no_format_is_asked_for_that_is_not_decoded_and_nothing_is_packed(site: Site) -> None:
    await fetch(site.url("ok"))
    accepted, packed = site.headers[0]["Accept"], site.headers[0]["Accept-Encoding"]
    assert "avif" not in accepted and "*" not in accepted and packed == "identity"


async def test_no_host_recognises_us_and_no_proxy_stands_between(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    names = FakeResolver({"shop.test": ["127.0.0.1"]})
    async with ImageFetcher(INSIDE, resolver=lambda: names) as fetcher:
        for _ in range(2):
            assert await got(fetcher, site.url("chunked", "shop.test")) == PICTURE
    assert ["Cookie" in headers for headers in site.headers] == [False, False]


@pytest.mark.parametrize("late", [True, False])
async def test_a_host_is_asked_for_no_more_at_a_time_than_is_set(site: Site, late: bool) -> None:
    options = {} if late else {"timeout_seconds": 0.4}
    config = INSIDE.model_copy(update={"host_concurrency": 1, "timeout_seconds": 0.4})
    async with ImageFetcher(config, resolver=lambda: FakeResolver({"a.test": LOCAL})) as fetcher:
        slow = asyncio.create_task(got(fetcher, site.url("slow", "a.test"), **options))
        await until(lambda: site.asked == ["slow"])
        quick = asyncio.create_task(got(fetcher, site.url("ok", "A.test"), **options))
        await asyncio.sleep(0.1)
        assert "ok" not in site.asked
        assert await quick == PICTURE
        await asyncio.wait([slow])
        assert isinstance(slow.exception(), ContentUnavailable)


async def test_waiting_for_a_turn_costs_nothing_of_a_pictures_time(site: Site) -> None:
    narrow = INSIDE.model_copy(update={"concurrency": 2})
    async with ImageFetcher(narrow) as fetcher:
        pictures = await asyncio.gather(*(got(fetcher, site.url("late"), timeout_seconds=0.5) for _ in range(20)))
    assert pictures == [PICTURE] * 20  # a second in all, of which the last waits 0.9


async def test_pictures_in_memory_wait_for_room_and_their_time_stands_still(site: Site) -> None:
    small = INSIDE.model_copy(update={"max_held_bytes": 2 * len(PICTURE)})
    held, has = asyncio.Event(), list[bytes]()
    async with ImageFetcher(small) as fetcher:

        async def decoded_later() -> None:
            async with fetcher.picture(site.url("ok"), timeout_seconds=1) as picture:
                has.append(picture)
                await held.wait()

        slow = [asyncio.create_task(decoded_later()) for _ in range(2)]
        await until(lambda: has == [PICTURE] * 2)
        waiting = asyncio.create_task(got(fetcher, site.url("ok"), timeout_seconds=0.2))
        await until(lambda: len(site.asked) == 3)
        await asyncio.sleep(0.6)
        assert not waiting.done()  # two tries would have ended by now
        held.set()
        assert await waiting == PICTURE
        await asyncio.gather(*slow)


async def test_a_picture_of_unknown_size_takes_the_room_of_the_largest_one(site: Site) -> None:
    most = {"max_bytes": 2 * len(PICTURE), "max_held_bytes": 2 * len(PICTURE) + 1}
    async with ImageFetcher(INSIDE.model_copy(update=most)) as fetcher:
        async with fetcher.picture(site.url("ok")):
            unknown = asyncio.create_task(got(fetcher, site.url("chunked")))
            await until(lambda: len(site.asked) == 2)
            await asyncio.sleep(0.1)
            assert not unknown.done()
        assert await unknown == PICTURE
        assert await got(fetcher, site.url("chunked")) == PICTURE  # its room was given back


async def test_a_slow_server_costs_no_more_than_the_budget(site: Site) -> None:
    started = asyncio.get_running_loop().time()
    async with ImageFetcher(INSIDE) as fetcher:
        with pytest.raises(ContentUnavailable, match=r"0\.2 s"):
            await got(fetcher, site.url("slow"), timeout_seconds=0.2)
    assert asyncio.get_running_loop().time() - started < 1.5


async def test_one_time_out_does_not_silence_a_host_and_eight_in_a_row_do(site: Site) -> None:
    now = [0.0]
    async with ImageFetcher(INSIDE, clock=lambda: now[0]) as fetcher:

        async def hurried() -> None:
            with pytest.raises(ContentUnavailable):
                await got(fetcher, site.url("slow"), timeout_seconds=0.05)

        await hurried()
        assert await got(fetcher, site.url("ok"), timeout_seconds=1) == PICTURE
        site.asked.clear()
        while len(site.asked) < QUIET_AFTER:
            await hurried()
        await hurried()
        assert len(site.asked) == QUIET_AFTER
        assert await got(fetcher, site.url("ok")) == PICTURE  # a late picture is asked for all the same
        now[0] += INSIDE.quiet_host_seconds
        assert await got(fetcher, site.url("ok"), timeout_seconds=1) == PICTURE


async def test_late_pictures_do_not_keep_those_in_a_hurry_out(site: Site) -> None:
    async with ImageFetcher(INSIDE.model_copy(update={"concurrency": 2})) as fetcher:
        late = [asyncio.create_task(got(fetcher, site.url("slow"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert await got(fetcher, site.url("ok"), timeout_seconds=0.5) == PICTURE
        outcomes = await asyncio.gather(*late, return_exceptions=True)
    assert all(isinstance(outcome, ContentUnavailable) for outcome in outcomes)


async def test_an_answer_that_is_no_picture_does_not_make_a_host_quiet(site: Site) -> None:
    async with ImageFetcher(INSIDE) as fetcher:
        with pytest.raises(ContentUnavailable):
            await got(fetcher, site.url("status/404"), timeout_seconds=1)
        assert await got(fetcher, site.url("ok"), timeout_seconds=1) == PICTURE


async def test_a_body_without_end_stops_at_the_cap(site: Site) -> None:
    capped = INSIDE.model_copy(update={"max_bytes": 500_000})
    assert await refused(site.url("endless"), capped) is Reason.IMAGE_TOO_LARGE


async def test_a_declared_length_above_the_cap_is_refused(site: Site) -> None:
    small = INSIDE.model_copy(update={"max_bytes": len(PICTURE) - 1})
    assert await refused(site.url("ok"), small) is Reason.IMAGE_TOO_LARGE
    assert await refused(site.url("chunked"), small) is Reason.IMAGE_TOO_LARGE
    for path in ("ok", "chunked"):
        assert await fetch(site.url(path), INSIDE.model_copy(update={"max_bytes": len(PICTURE)})) == PICTURE


async def test_a_closed_port_an_unknown_name_and_an_empty_body_are_worth_another_try(site: Site) -> None:
    for url in ("http://127.0.0.1:1/x", "http://nobody.test/x", site.url("empty")):
        with pytest.raises(ContentUnavailable):
            await fetch(url, names=FakeResolver({}))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "nonsense", "http://[::1", "http://user@127.0.0.1:1/x",
        "http://user:secret@127.0.0.1:1/x", "http://:secret@127.0.0.1:1/x", "ftp://user:secret@127.0.0.1/x",
    ],
)  # fmt: skip
async def test_only_plain_http_urls_are_fetched_and_no_login_is_repeated(url: str) -> None:
    with pytest.raises(Unprocessable) as caught:
        await fetch(url)
    assert caught.value.reason is Reason.IMAGE_REFUSED and "secret" not in caught.value.detail


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
    config = INSIDE.model_copy(update={"allowed_hosts": ("CDN.test", ".Img.test")})
    names = FakeResolver(dict.fromkeys(["cdn.test", "a.img.test", "img.test", "evilimg.test", "xcdn.test"], LOCAL))
    for host in ("cdn.test", "cdn.test.", "A.IMG.test", "b.a.img.test"):
        names.names[host] = LOCAL
        assert await fetch(site.url("ok", host), config, names) == PICTURE
    for host in ("img.test", "evilimg.test", "xcdn.test", "a.cdn.test", "127.0.0.1"):
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
