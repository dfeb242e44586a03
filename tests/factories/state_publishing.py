"""A state publisher over transactions in memory: how many writes it made, and what a server would not know of."""

from __future__ import annotations

import asyncio
import base64
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.item_states import ItemState, StateHead
from schemas.skew import ServedRows, SkewRecord
from streams.training.config import TrainConsumerConfig
from streams.training.reports import SkewReport
from streams.training.skew_watch import SkewWatch
from streams.training.state_publisher import StatePublisher
from tests.factories.feature_world import Take, World, columns_of
from trainer.features.config import FeatureConfig
from trainer.features.skew import recomputed
from trainer.features.state import FeatureState
from trainer.features.state_records import StateCopies, StateWriter
from trainer.features.states import ItemStates

CONFIG = FeatureConfig(max_items=64, partners=8)
ITEMS = 40


class Leads:
    """Transactions that wait for `gate` and may fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.topic: list[tuple[bytes, bytes | None]] = []
        self.sizes: list[int] = []
        self.outcomes: list[bytes] = []

    async def transact(self, records: Any) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.outcomes += [value for topic, _, value in records if topic == "mim.skew"]
        states = [(key, value) for topic, key, value in records if topic == "mim.item-states"]
        assert len(states) == len(records) or self.outcomes
        self.sizes.append(len(records))
        self.topic += states


class Silent:
    """A topic on which no server logs anything."""

    async def open(self, *, since: datetime) -> None: ...

    async def poll(self, *, wait_seconds: float) -> None: ...

    async def close(self) -> None: ...


class Scene:
    def __init__(
        self, topic: list[tuple[bytes, bytes | None]] | None = None, *, most: int = 100, every_seconds: float = 10
    ) -> None:
        self.leads, self.now, self.topic_id, self.looks = Leads(), 100.0, "t1", 0
        self.state = FeatureState(CONFIG, World(CONFIG, ITEMS))
        self.thread = SimpleNamespace(trainer=SimpleNamespace(moment=self.state, held_states=self.held_states))
        self.takes = 0

        async def read(writer: StateWriter) -> None:
            for record in topic or []:
                writer.heard(*record)

        self.reports: list[SkewReport] = []
        self.skew = SkewWatch(
            CONFIG,
            every_seconds=30,
            limit=0.01,
            topic="mim.skew",
            clock=lambda: self.now,
            on_report=self.reports.append,
            follow=lambda handle: Silent(),  # type: ignore[return-value,arg-type]
        )
        self.publisher = StatePublisher(
            self.leads,  # type: ignore[arg-type]
            self.thread,  # type: ignore[arg-type]
            StateWriter(CONFIG, log="log"),
            TrainConsumerConfig(states_every_takes=20, states_every_seconds=every_seconds, states_per_write=most),
            skew=self.skew,
            read=read,
            read_id=self.read_id,
            topic="mim.item-states",
            clock=lambda: self.now,
        )

    def read_id(self) -> str:
        self.looks += 1
        return self.topic_id

    def held_states(self, item_ids: list[str]) -> ItemStates:
        world = World(CONFIG, ITEMS)
        numbers = np.array([world.names.index(name) for name in ["", *item_ids]])
        return self.state.held_states(world.hashes(numbers), world.facts(numbers))

    @property
    def head(self) -> StateHead:
        """Of the newest write."""
        head = ItemState.model_validate_json(self.leads.topic[-1][1] or b"").head
        assert head is not None
        return head

    def served(self, item: str, *, wrong_by: float | NDArray[np.float32] = 0.0, before: int | None = None) -> bytes:
        """A row that a server scored from the newest write, with all features, or each, off by so much."""
        row = ServedRows(
            release_id="r1",
            number=self.head.number,
            before=self.head.before,
            now=1_000,
            targets=[item],
            values=base64.b64encode(bytes(4 * len(CONFIG.names))),
            probabilities=[0.5],
        )
        values = recomputed(CONFIG, row, self.held_states) + np.float32(wrong_by)
        row = row.model_copy(update={"values": values.astype("<f4").tobytes(), "before": before or self.head.before})
        return SkewRecord(features=CONFIG.version, served=row).model_dump_json().encode()

    def take(self, count: int) -> None:
        """So many more takes, one a second, each of another item in turn."""
        at = range(self.takes, self.takes + count)
        self.state.add(columns_of([Take(1 + n, 1 + n % ITEMS, n, n + 1) for n in at]), before=self.takes + count)
        self.takes += count

    async def after(self, seconds: float) -> int:
        """How many writes were made by then."""
        self.now += seconds
        for _ in range(2):  # one begins it, the next one notes that it came to its end
            await self.publisher.publish_if_due()
            for _ in range(3):
                await asyncio.sleep(0)
        return len(self.leads.sizes)

    @property
    def lag(self) -> int:
        """Takes that a server does not know of."""
        copies = StateCopies(CONFIG)
        for record in self.leads.topic:
            copies.apply(*record)
        return self.state.shared.takes - copies.states(self.state._items.hashes(ITEM), FACTS).shared.takes


ITEM = np.array([0])
FACTS = World(CONFIG, 1).facts(ITEM)
