"""Small builders for trainer tests: only what matters in a test is named in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from schemas.behaviours import Behaviour
from schemas.items import ItemEmbedding, SourceOffset
from trainer.networks.config import CiUBMConfig, LearnerConfig, TreesConfig
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.samples.catalogue import Catalogue

DAY0 = 1_700_000_000
DIM = 8


def at(second: float) -> datetime:
    return datetime.fromtimestamp(DAY0 + second, UTC)


def behaviour(
    event_id: str, kind: str = "exposure", *, user: str = "u1", item: str = "i1", second: float = 0, **more: object
) -> Behaviour:
    known = {"event_id": event_id, "kind": kind, "user_id": user, "item_id": item, "occurred_at": at(second)}
    return Behaviour.model_validate(known | more)


def unit_vector(seed: int, dim: int = DIM) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype("<f4")


def embedding(
    item: str, vector: np.ndarray | int, *, version: str = "enc-1", published: float = -10, content: str | None = None
) -> ItemEmbedding:
    """With this vector, or the unit vector of this seed."""
    vector = unit_vector(vector) if isinstance(vector, int) else np.asarray(vector, "<f4")
    return ItemEmbedding(
        item_id=item,
        encoder_version=version,
        vector=base64.b64encode(vector.tobytes()),
        dim=len(vector),
        content_hash=content or f"content-{item}",
        published_at=at(published),
        source=SourceOffset(partition=0, offset=0),
    )


def make_catalogue(items: int, *, twins: Sequence[int] = ()) -> Catalogue:
    """Items i1, i2, ... with their numbers; `twins` have the same content."""
    catalogue = Catalogue(DIM)
    for n in range(1, items + 1):
        catalogue.put_embedding(embedding(f"i{n}", n, content="twin" if n in twins else None))
        assert catalogue.number(f"i{n}") == n
    return catalogue


SMALL_MODEL = CiUBMConfig(
    id_width=4, id_rows=64, id_admit_after=1, categories=4, content_width=DIM, hidden=(16,), attention_hidden=8,
    numeric_width=2, cross_rank=4,
    trees=TreesConfig(count=3, depth=2, leaves=4, leaf_rows=2, rows=64, first_rows=24),
)  # fmt: skip


def small_config(**over: object) -> TrainerConfig:
    values: dict[str, object] = {
        "batch_rows": 8,
        "history_length": 5,
        "lateness_seconds": 10,
        "attribution_seconds": 5,
        "window_seconds": 100,
        "release_every_rows": 16,
        "model": SMALL_MODEL,
        "learner": LearnerConfig(),
    }
    return TrainerConfig.model_validate(values | over)


def make_trainer(
    config: TrainerConfig | None = None, *, partitions: int = 1, items: int = 40, variants: tuple[str, ...] = ("ciubm",)
) -> OnlineTrainer:
    trainer = OnlineTrainer(
        config or small_config(), encoder_version="enc-1", dim=DIM, partitions=range(partitions), variants=variants
    )
    for i in range(items):
        trainer.put_embedding(embedding(f"i{i}", i))
    return trainer


def click_log(
    impressions: int, *, users: int = 12, items: int = 40, seed: int = 0, partitions: int = 1, late_takes: int = 0
) -> list[list[Behaviour]]:
    """A log per partition (by user), in event-time order: every third impression is taken in its own second.

    With `late_takes` every so many of the others is taken 20 seconds later, half of them without saying which.
    """
    rng = np.random.default_rng(seed)
    logs: list[list[Behaviour]] = [[] for _ in range(partitions)]
    second = 0
    for n in range(impressions):
        second += int(rng.integers(0, 4))
        user = int(rng.integers(users))
        item = f"i{rng.integers(items)}"
        log = logs[user % partitions]
        log.append(behaviour(f"x{n}", user=f"u{user}", item=item, second=second))
        if n % 3 == 0:
            log.append(behaviour(f"t{n}", "click", user=f"u{user}", item=item, second=second, exposure_id=f"x{n}"))
        elif late_takes and n % late_takes == 0:
            named = {"exposure_id": f"x{n}"} if n % 2 else {}
            log.append(behaviour(f"l{n}", "cart", user=f"u{user}", item=item, second=second + 20, **named))
    return [sorted(log, key=lambda event: event.occurred_at) for log in logs]
