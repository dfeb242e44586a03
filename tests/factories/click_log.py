"""Random click logs, and records of them."""

from __future__ import annotations

import random
from datetime import UTC, datetime

from schemas.behaviours import Behaviour, BehaviourKind
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.stores.histories.config import BehaviourStoreConfig

LOG = TopicIncarnation("cluster-1", "mim.behaviours", "topic-1")


KEEP = BehaviourStoreConfig(history_length=5, remembered_event_ids=8)


def event(
    offset: int,
    event_id: str | None = None,
    *,
    user: str = "u1",
    item: str = "i1",
    at: float = 0.0,
    kind: str = "click",
) -> BehaviourRecord:
    behaviour = Behaviour(
        event_id=event_id or f"e{offset}",
        kind=BehaviourKind(kind),
        user_id=user,
        item_id=item,
        occurred_at=datetime.fromtimestamp(at, UTC),
    )
    return BehaviourRecord(offset, behaviour)


def random_log(seed: int, n: int) -> list[BehaviourRecord]:
    """A log with duplicates, disorder, broken records and offset gaps."""
    rng = random.Random(seed)
    log: list[BehaviourRecord] = []
    offset = 0
    for i in range(n):
        offset += rng.choice([1, 1, 1, 3])
        if rng.random() < 0.05:
            log.append(BehaviourRecord(offset, None))
            continue
        log.append(
            event(
                offset,
                f"e{rng.randrange(max(0, i - 6), i + 1)}",
                user=f"u{rng.randrange(6)}",
                item=f"i{rng.randrange(50)}",
                at=i + rng.randrange(-5, 5),
                kind=rng.choice(["exposure", "exposure", "click", "cart", "purchase"]),
            )
        )
    return log
