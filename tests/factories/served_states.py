"""A trainer that wrote states of items, and a server that has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.indexing.announcements import as_embedding
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.fake_consumer import FakeRecord
from tests.factories.samples import DAY0, behaviour
from tests.factories.serving import DIM, FEATURES, Bench, Open, row
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.state_records import Record, StateWriter
from trainer.features.take_columns import TakeColumns
from trainer.networks.collate import collate
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression
from trainer.samples.searches import searched

ITEMS = {
    "boot": {"year": 2020, "attributes": {"colour": "red", "for": ["winter", "snow"]}},
    "shoe": {"year": 2021, "attributes": {"colour": "red"}},
    "lamp": {"category": "light", "first_price": None},
    "sofa": {"attributes": {"seats": 3, "colour": "blue"}, "published_at_is": "inferred"},
    "untaken": {"category": "light", "attributes": {"colour": "blue"}},
}
NOW = 1_800_000_000
AT = NOW + 5_000
"""Moment of a request that names one; the bench's own clock shows `NOW`."""


class Trained:
    """A trainer's side: the catalogue, the state after some takes, and the topic that it wrote."""

    def __init__(self, config: FeatureConfig = FEATURES) -> None:
        self.config = config
        self.rows = [row_of(item) for item in ITEMS]
        self.catalogue = Catalogue(DIM, config)
        for each in self.rows:
            self.catalogue.put_embedding(as_embedding(each))
            self.catalogue.number(each.item_id)
        self.state = FeatureState(config, self.catalogue)
        self.writer = StateWriter(config, log="t")
        rng = np.random.default_rng(5)
        self.takes = [(int(u), ("boot", "shoe", "lamp", "sofa")[i]) for u, i in rng.integers(4, size=(60, 2))]

    def write(self, *, until: int = 60, since: int = 0, hold: bool = False) -> list[Record]:
        """Count these takes, one an hour before `NOW`, and write what changed."""
        part = list(enumerate(self.takes))[since:until]
        columns = TakeColumns(
            np.array([user + 1 for _, (user, _) in part]),
            np.array([self.catalogue.number(item) for _, (_, item) in part]),
            np.array([NOW - 3_600 * (61 - n) for n, _ in part]),
            np.array([n + 1 for n, _ in part]),
            np.zeros(len(part), bool),
        )
        self.state.add(columns, before=int(columns.second_T[-1]) + 1)
        write = self.writer.next(self.state, most=1_000, hold=hold)
        assert write is not None
        self.writer.written(write, takes=until)
        return list(write.records)

    def batch(
        self,
        targets: list[str],
        history: list[str],
        seconds: list[int],
        now: int,
        *,
        query_text: str | None = None,
        query_image: bytes | None = None,
        query_vector: NDArray[np.float32] | None = None,
    ) -> Any:
        """What the trainer would learn from: one row per target, all after this search, if any."""
        number, query = self.catalogue.number, 0
        if query_vector is not None:
            name = searched(query_text, query_image)
            assert name is not None
            self.catalogue.put_query(name, query_vector)
            query = number(name)
        rows = [
            Impression(
                f"e{target}",
                0,
                0,
                now,
                "ann",
                number(target),
                tuple(map(number, history)),
                tuple(seconds),
                retaken=False,
                defines_publish=False,
                query_text=query_text,
                query=query,
            )
            for target in targets
        ]
        return collate(rows, None, self.catalogue, history_length=3, moment=self.state).batch


def row_of(item: str) -> Any:
    return replace(row(item, f"words of {item}"), **ITEMS[item])


async def apply(bench: Bench, records: list[Record]) -> None:
    told = [FakeRecord(0, n, key, value) for n, (key, value) in enumerate(records)]
    await bench.service.states._apply(told, "source", len(told))


async def opened(open_bench: Open, trained: Trained, **more: Any) -> Bench:
    behaviours = InMemoryBehaviourStore()
    await behaviours.bind(TopicIncarnation("c", "t", "i"))
    events = [
        BehaviourRecord(n, behaviour(f"t{n}", "click", second=AT - DAY0 - 90 + 60 * n, user="ann", item=item))
        for n, item in enumerate(["shoe", "sofa"])
    ]
    await behaviours.record(0, events, first_offset=0, next_offset=2)
    bench: Bench = await open_bench(behaviours=behaviours, **more)
    await bench.index.upsert(trained.rows)
    await bench.serve(1, 0.0)
    return bench
