"""What a search adds to a score: the same questions without one, with one whose vector is cached, and with a new one.

All three are asked in turns of one server, whose release was taught searches. New searches are encoded by the default
encoder; the server waits for each, so that none is scored without.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiohttp
import numpy as np

from streams.bench.score_asking import Seconds, ask

WARM_UP = 20
"""Questions at the beginning of each turn that are not counted."""
SEARCHES = 64
"""Different searches that are cached."""
_KINDS = ("red", "blue", "leather", "winter", "wooden", "small", "summer", "classic")
_THINGS = ("boots", "desk lamp", "running shoes", "coffee table", "rain jacket", "guitar strings", "phone case", "rug")
_USED = b'"query":"used"'


async def measure_queries(
    session: aiohttp.ClientSession,
    url: str,
    bodies: Sequence[bytes],
    *,
    requests: int,
    rounds: int,
    clients: Sequence[int],
    on_round: Callable[[], None],
) -> Seconds:
    """Seconds of requests without a search (`plain`), with one that is cached (`hit`) and with a new one (`miss`)."""
    numbers = itertools.count()
    known = [title_of(next(numbers)) for _ in range(SEARCHES)]
    await ask(session, url, [with_search(bodies[0], text) for text in known], 1, holds=_USED)
    plain = itertools.cycle(bodies)
    hits = map(with_search, itertools.cycle(bodies), itertools.cycle(known))
    misses = map(with_search, itertools.cycle(bodies), map(title_of, numbers))
    kinds: dict[str, tuple[Iterator[bytes], bytes]] = {
        "plain": (plain, b'"query":null'),
        "hit": (hits, _USED),
        "miss": (misses, _USED),
    }
    seconds: Seconds = {}
    for _ in range(rounds):
        for n in clients:
            for name, (questions, holds) in kinds.items():
                asked = list(itertools.islice(questions, requests + WARM_UP))
                took = await ask(session, url, asked, n, holds=holds)
                seconds.setdefault((n, name), []).extend(took[WARM_UP:])
        on_round()
    return seconds


def title_of(number: int) -> str:
    """Title of an item, and what a user who looks for it searches."""
    kind, thing = _KINDS[number % len(_KINDS)], _THINGS[number // len(_KINDS) % len(_THINGS)]
    return f"{kind} {thing} {number}"


def with_search(body: bytes, text: str) -> bytes:
    """The question asked after a search."""
    return json.dumps(json.loads(body) | {"query_text": text}).encode()


def query_summary(seconds: Seconds) -> dict[str, Any]:
    """Medians in milliseconds; `query_hit_ratio` and `query_miss_ratio` over those without a search, at the worst
    concurrency.
    """
    cells: list[dict[str, Any]] = []
    for n in sorted({clients for clients, _ in seconds}):
        p50 = {name: 1e3 * float(np.median(took)) for (clients, name), took in seconds.items() if clients == n}
        cells.append(
            {
                "clients": n,
                "p50_ms": round(p50["plain"], 3),
                "hit_p50_ms": round(p50["hit"], 3),
                "miss_p50_ms": round(p50["miss"], 3),
                "hit_ratio": round(p50["hit"] / p50["plain"], 3),
                "miss_ratio": round(p50["miss"] / p50["plain"], 3),
            }
        )
    worst = {f"query_{name}_ratio": max(cell[f"{name}_ratio"] for cell in cells) for name in ("hit", "miss")}
    return worst | {"queries_by_clients": cells}
