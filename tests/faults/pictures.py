"""A site of pictures that are late: each address answers 503 a few times before it gives its picture.

An address tells everything: `<PICTURES>/<colour>/<times>/<number>`. Plans name `PICTURES`; where the site really
listens is known when it is sent.
"""

from __future__ import annotations

import io
from collections import Counter
from functools import cache

from aiohttp import web
from PIL import Image

PICTURES = "http://pictures.invalid"
COLOURS = ("red", "green", "blue")


def address(colour: str, times: int, number: int) -> str:
    """The address of a picture that comes at the request after `times` others."""
    return f"{PICTURES}/{colour}/{times}/{number}"


@cache
def _png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


def picture_at(url: str) -> bytes:
    """The bytes that an address leads to in the end."""
    return _png(url.split("/")[3])


class LatePictures:
    """The site, inside the running loop."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def open(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_get("/{colour}/{times}/{number}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self._asked[request.path] += 1
        if self._asked[request.path] <= int(request.match_info["times"]):
            return web.Response(status=503)
        return web.Response(body=_png(request.match_info["colour"]))
