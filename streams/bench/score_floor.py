"""The floor of a score over HTTP: an aiohttp server that parses the question, runs the bare forward pass on tensors
that lie ready, and answers bytes that lie ready.

The pass is the network's own, as training runs it; the real server has one made for a single user's request.

    python -m streams.bench.score_floor floor PLAN      one JSON file: what to draw, the release's folder, the answer

`POST /inline` computes on the event loop, `POST /threads` in as many threads as the real server has.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from aiohttp import web
from numpy.typing import NDArray

from streams.bench.score_world import DIM, draw_world
from streams.runtime.logs import configure_logging
from streams.runtime.process import run_until_stopped
from streams.serving.config import ServeConfig
from trainer.networks.ciubm import CtrBatch
from trainer.networks.item_rows import ItemRows
from trainer.networks.scorer import Scorer, network_of

log = structlog.get_logger()

READY_BATCHES = 64


async def serve(plan: dict[str, Any], answer: bytes) -> None:
    """Answer until stopped; `floor.ready` in the log says where."""
    torch.set_num_threads(1)  # as the real server
    world = draw_world(**plan["world"])
    weights, manifest = world.release(plan["world"]["history"])
    network, scorer = network_of(weights, manifest), Scorer.from_release(weights, manifest)
    vectors = dict(zip(world.item_ids, world.vectors_IV, strict=True))
    asked = world.questions[:READY_BATCHES]
    rows = [(ItemRows.of([*items, *world.histories[user]], vectors, DIM), len(items)) for user, items in asked]
    batches = itertools.cycle([scorer.prepare(*each) for each in rows])
    threads = ThreadPoolExecutor(ServeConfig().score_threads)

    @torch.inference_mode()
    def forward(batch: CtrBatch) -> NDArray[np.float64]:
        return torch.sigmoid(network(batch).double()).numpy()

    async def inline(request: web.Request) -> web.Response:
        json.loads(await request.read())
        forward(next(batches))
        return web.Response(body=answer, content_type="application/json")

    async def threaded(request: web.Request) -> web.Response:
        json.loads(await request.read())
        await asyncio.get_running_loop().run_in_executor(threads, forward, next(batches))
        return web.Response(body=answer, content_type="application/json")

    async def work(stop: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/inline", inline)
        app.router.add_post("/threads", threaded)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        log.info("floor.ready", address=f"http://{host}:{port}")
        await stop.wait()
        await runner.cleanup()

    await run_until_stopped(work)
    threads.shutdown()


if __name__ == "__main__":
    configure_logging()
    plan = json.loads(Path(sys.argv[2]).read_text())
    asyncio.run(serve(plan, Path(plan["answer"]).read_bytes()))
