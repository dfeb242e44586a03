"""Offsets against a list of what became of each event."""

from __future__ import annotations

import random

import pytest

from tests.factories.feeding import through_bytes
from trainer.samples.offsets import OffsetTracker


class Plain:
    """One partition: what became of each event, by its offset."""

    def __init__(self) -> None:
        self.open: list[bool] = []
        self.fate: list[str] = []

    @property
    def committed(self) -> int:
        return next((offset for offset, yes in enumerate(self.open) if yes), len(self.open))

    @property
    def trained(self) -> int:
        first = next((offset for offset, fate in enumerate(self.fate) if fate == "waits"), len(self.fate))
        return max((offset + 1 for offset in range(first) if self.fate[offset] == "trained"), default=0)


VERBS = ("read", "read", "read done", "commit", "trained", "trained", "discard", "restart")


@pytest.mark.parametrize("seed", range(4))
def test_offsets_are_those_of_a_plain_list_whatever_the_order(seed: int) -> None:
    rng = random.Random(seed)
    script = [(rng.choice(VERBS), rng.randrange(2), rng.randrange(6)) for _ in range(60)]
    tracker, plain = OffsetTracker([0, 1]), {0: Plain(), 1: Plain()}
    for verb, number, which in script:
        own = plain[number]
        waiting = [offset for offset, fate in enumerate(own.fate) if fate == "waits"]
        opened = [offset for offset, yes in enumerate(own.open) if yes]
        if verb.startswith("read"):
            done = verb == "read done"
            tracker.read(number, len(own.open), done=done)
            own.open.append(not done)
            own.fate.append("never" if done else "waits")
        elif verb == "restart":
            state, tracker = tracker.snapshot(), OffsetTracker([0, 1])
            tracker.restore(through_bytes(state))
        elif verb == "commit" and opened:
            tracker.commit(number, opened[which % len(opened)])
            own.open[opened[which % len(opened)]] = False
        elif verb == "trained" and waiting:
            tracker.trained(number, waiting[which % len(waiting)])
            own.fate[waiting[which % len(waiting)]] = "trained"
        elif verb == "discard" and waiting:
            offset = waiting[which % len(waiting)]
            tracker.discard(number, offset)
            own.fate[offset], own.open[offset] = "never", False
        assert tracker.read_offsets() == {p: len(each.open) for p, each in plain.items()}
        assert tracker.committed_offsets() == {p: each.committed for p, each in plain.items()}
        assert tracker.trained_offsets() == {p: each.trained for p, each in plain.items()}


def test_offsets_of_other_partitions_are_refused() -> None:
    with pytest.raises(ValueError, match="partitions"):
        OffsetTracker([0]).restore(OffsetTracker([0, 1]).snapshot())
