"""Ways to feed a trainer, to keep its state, and to look whether it accounts for what it was fed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from schemas.behaviours import Behaviour
from streams.stores.artifacts.arrays import pack_arrays, unpack_arrays
from trainer.online.intake import EventCounts
from trainer.online.trainer import OnlineTrainer, StepReport
from trainer.state import State

Event = TypeVar("Event")


def observe_all(trainer: OnlineTrainer, events: Iterable[Behaviour], *, partition: int = 0) -> None:
    for offset, event in enumerate(events):
        trainer.intake.observe(partition, offset, event)


def pump(trainer: OnlineTrainer) -> list[StepReport]:
    """Train on everything that is ready."""
    reports = []
    trainer.intake.advance()
    while (report := trainer.step()) is not None:
        reports.append(report)
        trainer.intake.advance()
    return reports


def finish(trainer: OnlineTrainer) -> None:
    """Train on everything that is left."""
    trainer.intake.finish()
    pump(trainer)


def fetches(
    logs: Sequence[Sequence[Event]], rng: np.random.Generator, *, most: int
) -> Iterator[tuple[int, list[tuple[int, Event]]]]:
    """The logs of several partitions, read side by side: a partition and up to `most` of its offsets and events."""
    positions = [0] * len(logs)
    while waiting := [p for p in range(len(logs)) if positions[p] < len(logs[p])]:
        p = int(rng.choice(waiting))
        start = positions[p]
        positions[p] = min(len(logs[p]), start + int(rng.integers(1, most + 1)))
        yield p, [(offset, logs[p][offset]) for offset in range(start, positions[p])]


def through_bytes(state: State) -> State:
    """As it is read again from where it was kept."""
    return State(unpack_arrays(pack_arrays(state.arrays)), json.loads(json.dumps(state.values, allow_nan=False)))


def is_balanced(counts: EventCounts) -> bool:
    """Whether no event is missing and none was counted twice."""
    settled = counts.trained + counts.late + counts.duplicate + counts.dead_lettered + counts.erased
    return counts.received == settled + counts.pending
