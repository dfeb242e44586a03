"""A trainer's state of items, the topic that it writes, and a server that follows it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.factories.feature_world import Take, World, columns_of, random_takes
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.state_records import StateCopies, StateWriter

CONFIG = FeatureConfig(attributes=("genres", "colour"), history_length=8, partners=16, max_items=64)
ITEMS = 40
TAKES = random_takes(400, users=15, items=ITEMS, seconds=40_000, seed=3)


class Pipe:
    """A trainer's state, the topic that it writes, and a server that follows."""

    def __init__(self, config: FeatureConfig = CONFIG, *, log: str = "log") -> None:
        self.world = World(config, ITEMS)
        self.state = FeatureState(config, self.world)
        self.writer = StateWriter(config, log=log)
        self.topic: list[tuple[bytes, bytes | None]] = []
        self.copies = StateCopies(config)

    def count(self, takes: list[Take]) -> None:
        self.state.add(columns_of(takes), before=takes[-1].second + 1)

    def write(self, *, most: int = 1_000) -> int:
        """Write what is due, until nothing is left; how many writes that took."""
        writes = 0
        while (write := self.writer.next(self.state, most=most)) is not None:
            self.topic += write.records
            self.writer.written(write, takes=self.state.shared.takes)
            for record in write.records:
                self.copies.apply(*record)
            writes += 1
        return writes

    def compacted(self) -> list[tuple[bytes, bytes | None]]:
        """The topic as a server that starts later reads it."""
        newest = {key: place for place, (key, _) in enumerate(self.topic)}
        return [self.topic[place] for place in sorted(newest.values())]

    def restart(self, *, late: bool = False, log: str = "log") -> None:
        """Another trainer takes over; it has what this one had, or nothing."""
        if late:
            self.state = FeatureState(self.state.config, self.world)
        self.state.changed_keys = None
        self.writer = StateWriter(self.state.config, log=log)
        for record in self.compacted():
            self.writer.heard(*record)


def asked(config: FeatureConfig = CONFIG) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], ...]]:
    """The items of a request by number, and its arrays: every item a candidate, one history for all."""
    numbers = np.arange(ITEMS + 1)
    history = np.array([[3, 9, 1, 22]])
    return numbers, (numbers[1:], history, np.array([[39_000, 38_000, 20_000, 5]]), np.full(ITEMS, 41_000))


def of_trainer(pipe: Pipe) -> NDArray[np.float32]:
    numbers, request = asked()
    return features(pipe.state.config, pipe.state.states(numbers), *request)


def of_server(copies: StateCopies, world: World) -> NDArray[np.float32]:
    numbers, request = asked()
    return features(copies.config, copies.states(world.hashes(numbers), world.facts(numbers)), *request)
