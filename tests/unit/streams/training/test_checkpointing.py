"""Snapshots beside training: what is away puts one off, and ends nothing."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, StoreUnavailable, Unavailable
from streams.training.checkpointing import Checkpointer
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.state import State


class Away:
    """Snapshots that cannot be written now."""

    def __init__(self, error: Unavailable) -> None:
        self.error = error

    def write(self, *_: Any, **__: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokerUnavailable("Kafka", "nothing answers"), StoreUnavailable("disk", "full")])
async def test_a_snapshot_that_cannot_be_written_now_is_told_and_ends_nothing(error: Unavailable) -> None:
    keeping = Checkpointer(Away(error), every_events=1, begins={0: 0})  # type: ignore[arg-type]
    trainer = OnlineTrainer(TrainerConfig(), encoder_version="e", dim=4, partitions=[0])

    async def copy() -> State:
        return State()

    await keeping.snapshot(trainer, copy, dict)
    assert not await keeping.written()
