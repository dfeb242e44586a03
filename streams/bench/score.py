"""`mimstream bench score`: scores over HTTP from the real server and stores, beside what HTTP and the model cost alone.

The floor is an aiohttp server that only parses the question, runs the network's own forward pass, as training does, on
tensors that lie ready, and answers a body of the same size. Both are asked the same questions by the same client, in
turns, so that a machine that becomes faster or slower does so for both. Then the server takes up a release that was
taught searches, and `streams.bench.score_queries` says what a search adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

from schemas.errors import Misconfigured
from schemas.scoring import MAX_CANDIDATES
from streams.bench.score_asking import Seconds, ask
from streams.bench.score_queries import WARM_UP, measure_queries, query_summary
from streams.runtime.progress import ProgressBar, progress_bar
from streams.settings import Settings

CLIENTS = (1, 8)
ROUNDS = 10
HISTORY = 50
"""What a release reads where nothing else is set."""
USERS = 64
QUESTIONS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument("--candidates", type=int, default=200, metavar="N", help="items scored per request")
    parser.add_argument("--history", type=int, default=HISTORY, metavar="N", help="takes of each user that count")
    parser.add_argument("--items", type=int, default=5_000, metavar="N", help="items in the center")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="counted requests of each turn")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure and print."""
    if not 1 <= options.candidates <= min(MAX_CANDIDATES, options.items):
        raise Misconfigured(f"--candidates lies between 1 and {MAX_CANDIDATES}, and is at most --items")
    if min(options.history, options.requests) < 1 or options.history > settings.behaviours.history_length:
        raise Misconfigured(
            f"--history lies between 1 and {settings.behaviours.history_length} (MIM_BEHAVIOURS__HISTORY_LENGTH), "
            "--requests is at least 1"
        )
    from streams.bench.score_system import ScoreSystem

    load = os.getloadavg()[0]
    world = {
        "items": options.items,
        "users": USERS,
        "history": options.history,
        "candidates": options.candidates,
        "questions": QUESTIONS,
    }
    with (
        tempfile.TemporaryDirectory(prefix="mimstream-bench-") as folder,
        progress_bar("starting Kafka, Valkey, Milvus Lite and the servers", 2 * ROUNDS + 2) as bar,
        ScoreSystem(settings, Path(folder), world, options.config) as system,
    ):
        bar.advance(what="asking in turns")
        bodies = system.world.bodies()
        seconds = asyncio.run(_measure(system.routes, bodies, options.requests, bar))
        taught = system.teach()
        bar.advance(what="asking with searches")
        searched = asyncio.run(_measure_queries(taught, bodies, options.requests, bar))
    result = summary(seconds) | query_summary(searched)
    result |= {name: getattr(options, name) for name in ("candidates", "history", "items")}
    result |= {"cores": os.cpu_count(), "load_average_before": round(load, 2)}
    print(json.dumps(result)) if options.json else _print(result)
    return 0


async def _measure(routes: Mapping[str, str], bodies: Sequence[bytes], requests: int, bar: ProgressBar) -> Seconds:
    seconds: Seconds = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await ask(session, routes["system"], bodies, 1)  # every vector and history is read once
        for _ in range(ROUNDS):
            for clients in CLIENTS:
                for name, url in routes.items():
                    asked = list(islice(cycle(bodies), requests + WARM_UP))
                    took = await ask(session, url, asked, clients)
                    seconds.setdefault((clients, name), []).extend(took[WARM_UP:])
            bar.advance()
    return seconds


async def _measure_queries(url: str, bodies: Sequence[bytes], requests: int, bar: ProgressBar) -> Seconds:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await measure_queries(
            session, url, bodies, requests=requests, rounds=ROUNDS, clients=CLIENTS, on_round=bar.advance
        )


def summary(seconds: Seconds) -> dict[str, Any]:
    """Percentiles in milliseconds, and the system's over those of the faster floor (by p50) at the same concurrency."""
    cells: list[dict[str, Any]] = []
    for clients in sorted({clients for clients, _ in seconds}):
        cuts = {
            name: [1e3 * float(cut) for cut in (*np.quantile(took, (0.5, 0.99)), np.mean(took))]
            for (n, name), took in seconds.items()
            if n == clients
        }
        floor = min((name for name in cuts if name != "system"), key=lambda name: cuts[name][0])
        cells.append(
            {
                "clients": clients,
                "p50_ms": round(cuts["system"][0], 3),
                "p99_ms": round(cuts["system"][1], 3),
                "mean_ms": round(cuts["system"][2], 3),
                "floor_p50_ms": round(cuts[floor][0], 3),
                "floor_p99_ms": round(cuts[floor][1], 3),
                "floor_mean_ms": round(cuts[floor][2], 3),
                "ratio_to_floor": round(cuts["system"][0] / cuts[floor][0], 3),
                "ratio_to_floor_p99": round(cuts["system"][1] / cuts[floor][1], 3),
                "ratio_to_floor_mean": round(cuts["system"][2] / cuts[floor][2], 3),
                "floor": floor,
                "requests": len(seconds[clients, "system"]),
            }
        )
    return {"ratio_to_floor": max(cell["ratio_to_floor"] for cell in cells), "by_clients": cells}


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['candidates']} candidates, history of {result['history']}, over HTTP")
    for name in ("clients", "p50 ms", "p99 ms", "floor p50", "floor p99", "ratio p50", "ratio p99"):
        table.add_column(name, justify="right")
    for cell in result["by_clients"]:
        table.add_row(
            str(cell["clients"]),
            *(f"{cell[name]:.2f}" for name in ("p50_ms", "p99_ms", "floor_p50_ms", "floor_p99_ms")),
            *(f"{cell[name]:.2f}" for name in ("ratio_to_floor", "ratio_to_floor_p99")),
        )
    searches = Table(title="beside it, of a release that reads searches: cached ones, and new ones")
    for name in ("clients", "p50 ms", "hit p50", "miss p50", "hit ratio", "miss ratio"):
        searches.add_column(name, justify="right")
    for cell in result["queries_by_clients"]:
        searches.add_row(
            str(cell["clients"]),
            *(f"{cell[name]:.2f}" for name in ("p50_ms", "hit_p50_ms", "miss_p50_ms", "hit_ratio", "miss_ratio")),
        )
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(searches)
