"""A trainer that keeps its state of the newest write, and a server that follows it and logs rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schemas.skew import SkewRecord
from streams.training.reports import SkewReport
from streams.training.skew_watch import SkewWatch
from tests.factories.releases import make_manifest
from tests.factories.samples import SMALL_MODEL
from tests.factories.served_states import AT, ITEMS, Trained, apply, opened
from tests.factories.serving import DIM, FEATURES, Bench, Open
from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import dense_width
from trainer.networks.scorer import Scorer
from trainer.samples.id_hashes import hash_columns

ASKED = {"user_id": "ann", "item_ids": [*ITEMS, "never heard of"], "trigger_item": "lamp", "at": AT}


class Scene:
    """A trainer that keeps its state of the newest write, and a server that follows it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.trained = bench, Trained()
        self.reports: list[SkewReport] = []
        self.now = 0.0
        self.watch = SkewWatch(
            FEATURES,
            every_seconds=30,
            limit=0.01,
            topic="mim.skew",
            clock=lambda: self.now,
            on_report=self.reports.append,
            follow=lambda handle: None,  # type: ignore[return-value,arg-type]
        )
        network = CiUBM(SMALL_MODEL, vector_width=DIM, seed=1, dense_width=dense_width(FEATURES)).eval()
        scorer = Scorer(network, make_manifest(1), history_length=3, features=FEATURES)
        model = bench.service.models.current
        assert model is not None
        bench.service.models.current = replace(model, scorer=scorer)

    async def write(self, *, until: int, since: int = 0, lost: int | None = None) -> None:
        """Takes, a write of which the state is kept, and what the server hears of it."""
        records = self.trained.write(until=until, since=since, hold=True)
        assert self.trained.writer._head is not None and self.trained.writer._head.held
        self.watch.begin(self.trained.writer._head)
        await apply(self.bench, [record for n, record in enumerate(records) if n != lost])

    def held_states(self, item_ids: Any) -> Any:
        """`OnlineTrainer.held_states`."""
        hashes = np.concatenate([np.zeros((1, 2), np.int64), hash_columns(item_ids)])
        return self.trained.state.held_states(hashes, self.trained.catalogue.facts_by_id(item_ids))

    @property
    def moment(self) -> Any:
        return self.trained.state

    async def ask(self, **more: Any) -> None:
        status, _ = await self.bench.post("/v1/score", ASKED | more)
        assert status == 200

    def compare(self) -> SkewRecord | None:
        waiting = self.bench.service.skew.waiting
        for value in waiting:
            self.watch.hear(value)
        waiting.clear()
        record = self.watch.compare(self)  # type: ignore[arg-type]
        return None if record is None else SkewRecord.model_validate_json(record[2])


@pytest.fixture
async def scene(open_bench: Open) -> Scene:
    return Scene(await opened(open_bench, Trained()))
