"""A site whose pictures a test uploads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


class PictureSite:
    """A site whose pictures a test uploads."""

    def __init__(self) -> None:
        self.there: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        name = request.path.lstrip("/")
        self.asked.append(name)
        return web.Response(body=self.there[name]) if name in self.there else web.Response(status=503)


@asynccontextmanager
async def picture_site() -> AsyncIterator[PictureSite]:
    site = PictureSite()
    app = web.Application()
    app.router.add_get("/{name}", site.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    try:
        yield site
    finally:
        await runner.cleanup()
