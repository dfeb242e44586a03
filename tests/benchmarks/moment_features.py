"""Cost of the features of the moment on one core: `python -m tests.benchmarks.moment_features`.

Prints microseconds per take and per training row, milliseconds per 200 candidates and 50 history items, bytes per item.
CPU time of the quietest tenth of the calls, so that other processes of the machine count little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.take_columns import TakeColumns
from trainer.samples.id_hashes import hash_columns
from trainer.samples.item_facts import FactRows, facts_of

ITEMS, USERS, TAKES, TAKES_OF_A_STEP, ROWS, DRAWN = 10_000, 2_000, 60_000, 51, 255, 4
CONFIG = FeatureConfig(attributes=("genres", "director", "actors"))


class Items:
    """Items with 7 attribute values each."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._hashes = hash_columns([f"i{n}" for n in range(ITEMS + 1)])
        self._hashes[0] = 0
        self._facts = FactRows.empty(CONFIG, ITEMS + 1)
        for number in range(1, ITEMS + 1):
            attributes = {
                "genres": [f"g{n}" for n in rng.choice(25, 3, replace=False)],
                "director": f"d{rng.integers(3_000)}",
                "actors": [f"a{n}" for n in rng.integers(0, 5_000, 3)],
            }
            category, price, year = f"g{rng.integers(25)}", float(rng.random() + 0.1), int(rng.integers(1950, 2020))
            facts = facts_of(
                CONFIG, category=category, price=price, year=year, attributes=attributes, published_at=float(number)
            )
            self._facts.put(number, facts)

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._hashes[numbers]

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        return self._facts.rows(numbers)


def quiet_seconds(call: Callable[[], object], times: int) -> float:
    """CPU seconds of a call in the quietest tenth of so many."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return float(np.mean(np.sort(found)[: max(1, times // 10)]))


def measured() -> dict[str, float]:
    """All figures."""
    rng = np.random.default_rng(0)
    state, popularity = FeatureState(CONFIG, Items(rng)), 1 / np.arange(1, ITEMS + 1) ** 0.8
    popularity /= popularity.sum()
    seconds = np.sort(rng.integers(0, 10**6, TAKES))
    takes = TakeColumns(
        rng.integers(1, USERS, TAKES),
        rng.choice(ITEMS, TAKES, p=popularity) + 1,
        seconds,
        np.arange(1, TAKES + 1),
        np.zeros(TAKES, bool),
    )
    steps = iter(range(0, TAKES - TAKES_OF_A_STEP, TAKES_OF_A_STEP))

    def add() -> None:
        start = next(steps)
        part = takes.select(slice(start, start + TAKES_OF_A_STEP))
        state.add(part, before=int(part.second_T[-1]) + 1)

    for _ in range(800):
        add()
    take = quiet_seconds(add, 300) / TAKES_OF_A_STEP
    rows = ROWS // (DRAWN + 1)
    history = np.repeat(rng.choice(ITEMS, (rows, 50), p=popularity) + 1, DRAWN + 1, axis=0)
    targets = rng.choice(ITEMS, ROWS, p=popularity) + 1
    drawn = np.arange(ROWS) % (DRAWN + 1) > 0
    named = next(steps) - 1 - np.arange(ROWS)
    source = np.where(drawn, takes.event_T[named], 0)
    targets = np.where(drawn, takes.item_T[named], targets)

    def row() -> None:
        everything = np.concatenate([[0], targets, history.ravel()])
        numbers, places = np.unique(everything, return_inverse=True)
        features(
            CONFIG,
            state.states(numbers),
            places[1 : 1 + ROWS],
            places[1 + ROWS :].reshape(history.shape),
            np.full(history.shape, 10**5),
            np.full(ROWS, 10**6),
            state.sources(targets, source, takes.second_T[named]),
        )

    per_row = quiet_seconds(row, 100) / ROWS
    candidates = rng.choice(ITEMS, 200, p=popularity) + 1
    numbers, places = np.unique(np.concatenate([[0], candidates, history[0]]), return_inverse=True)
    states = state.states(numbers)
    one = quiet_seconds(
        lambda: features(
            CONFIG, states, places[1:201], places[201:][None], np.full((1, 50), 10**5), np.full(200, 10**6)
        ),
        300,
    )
    facts = sum(column[:1].nbytes for column in vars(states.facts).values())
    return {
        "us_per_take": 1e6 * take,
        "us_per_row": 1e6 * per_row,
        "ms_per_200_candidates": 1e3 * one,
        "bytes_per_item": len(states.takes.to_bytes(0)) + facts + 8 + 16,  # key, and its places in the array of slots
    }


if __name__ == "__main__":
    print(json.dumps(measured(), indent=1))
