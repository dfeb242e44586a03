"""A release ladder over a model store in a folder, with a leader of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from schemas.manifests import Fence, ReleaseNotice
from streams.broker.cluster import ClusterTopics
from streams.stores.artifacts.registry import ModelRegistry
from streams.training.promotion_gate import PromotionGate
from streams.training.release_publisher import ReleasePublisher
from tests.factories.samples import DIM, click_log, make_trainer, small_config
from trainer.online.gate import GateConfig
from trainer.online.trainer import Candidate, OnlineTrainer

LOG = ClusterTopics("cluster", {"embeddings": "e", "behaviours": "b"}, {"embeddings": [0], "behaviours": [0]})


GATE = GateConfig(trial_rows=32, min_takes=1_000)


class FakeLeadership:
    """A leadership that is never lost: a fence, and a transaction that keeps the notices it was given."""

    fence = Fence(producer_id=1, epoch=1)
    settled = True

    def __init__(self) -> None:
        self.notices: list[ReleaseNotice] = []

    def confirm(self) -> None: ...

    async def transact(self, records: Sequence[tuple[str, bytes, bytes]] = (), offsets: object = None) -> None:
        self.notices += [ReleaseNotice.model_validate_json(value) for _, _, value in records]


class Scene:
    """A trainer with a log before it, and the store that it releases into."""

    def __init__(self, store: ModelRegistry, *, release_every_rows: int = 64) -> None:
        self.store, self.leads, self.log = store, FakeLeadership(), LOG
        self.trainer: OnlineTrainer = make_trainer(small_config(release_every_rows=release_every_rows))
        self.events = iter(enumerate(click_log(400)[0]))

    async def start(self) -> Scene:
        self.publisher = ReleasePublisher(
            self.store,
            self.leads,  # type: ignore[arg-type]
            notices_topic="models",
            read_log=lambda: self.log,
            clock=lambda: 1_700_000_000.0,
        )
        await self.publisher.take_over(encoder_version="enc-1", dim=DIM)
        self.gate = PromotionGate(self.store, self.publisher, GATE)
        return self

    def learn(self, until: Callable[[], bool]) -> None:
        while not until():
            offset, event = next(self.events)
            self.trainer.intake.observe(0, offset, event)
            self.trainer.intake.advance()
            while not until() and self.trainer.step() is not None:
                self.trainer.intake.advance()

    async def candidate(self, *, spoil: float = 0.0, **more: Any) -> Candidate:
        self.learn(self.trainer.release_due)
        made = self.trainer.candidate()
        self.trainer.begin_next()
        if spoil:
            made = replace(
                made, weights={n: w * spoil if w.is_floating_point() else w for n, w in made.weights.items()}
            )
        await self.gate.admit(self.trainer, made, {"behaviours": dict(made.offsets)}, **more)
        return made

    def spoil_weights(self, factor: float) -> None:
        """Make the training model itself worse."""
        learner = self.trainer._variants._learners["ciubm"]
        with torch.no_grad():
            for weight in (*learner.model.parameters(), *learner._average):
                weight.mul_(factor)

    async def decide(self) -> None:
        shadow = self.trainer.shadow
        assert shadow is not None
        self.learn(lambda: shadow.complete)
        await self.gate.decide(self.trainer)

    @property
    def current(self) -> int | None:
        """Number of the serving release."""
        pointer = self.store.current()
        return None if pointer is None else int(pointer.release_id[1:7])
