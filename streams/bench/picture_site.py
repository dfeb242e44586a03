"""A local site with the pictures of the benchmark, as slow and as unreliable as a site in the internet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from aiohttp import web

from streams.bench.encode_content import BenchItems


@dataclass(frozen=True)
class PictureSite:
    """How its answers are: `latency_seconds` after the request, and 503 in place of a picture with `error_share`."""

    latency_seconds: float = 0.3
    error_share: float = 0.02

    @asynccontextmanager
    async def serving(self, content: BenchItems) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Serve the pictures of `content` while the block runs; gives its records with URLs in place of pictures."""
        draws = np.random.default_rng(0)

        async def answer(request: web.Request) -> web.Response:
            fails = draws.random() < self.error_share
            await asyncio.sleep(self.latency_seconds)
            return web.Response(status=503) if fails else web.Response(body=content.items[_number(request)].image)

        app = web.Application()
        app.router.add_get("/{number:[0-9]+}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=1_024).start()
            base = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield [(key, _with_url(value, f"{base}/{n}")) for n, (key, value) in enumerate(content.records)]
        finally:
            await runner.cleanup()


def _number(request: web.Request) -> int:
    return int(request.match_info["number"])


def _with_url(record: bytes, url: str) -> bytes:
    item = json.loads(record)
    del item["image"]
    return json.dumps(item | {"image_url": url}, ensure_ascii=False).encode()
