"""Random click logs, and records of them."""

from __future__ import annotations

import random

from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.stores.histories.config import BehaviourStoreConfig
from tests.factories.samples import DAY0, behaviour

LOG = TopicIncarnation("cluster-1", "mim.behaviours", "topic-1")


KEEP = BehaviourStoreConfig(history_length=5, remembered_event_ids=8)


def event(
    offset: int, event_id: str | None = None, *, user: str = "u1", item: str = "i1", at: float = 0, kind: str = "click"
) -> BehaviourRecord:
    made = behaviour(event_id or f"e{offset}", kind, user=user, item=item, second=at - DAY0)
    return BehaviourRecord(offset, made)


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
        event_id = f"e{rng.randrange(max(0, i - 6), i + 1)}"
        user, item = f"u{rng.randrange(6)}", f"i{rng.randrange(50)}"
        at, kind = i + rng.randrange(-5, 5), rng.choice(["exposure", "exposure", "click", "cart", "purchase"])
        log.append(event(offset, event_id, user=user, item=item, at=at, kind=kind))
    return log
