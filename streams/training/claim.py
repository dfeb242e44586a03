"""Claims the term of a new trainer: a running number that orders trainers where Kafka cannot, in the stores.

```text
see the pointer of the snapshots ──> Kafka confirms that we lead ──> compare and swap that pointer: our term, one higher
        └───────────────────────────── changed meanwhile: again ──────────────────────┘
```

A trainer that was replaced cannot claim after its successor: either it proved its leadership before that one was
elected, and then the pointer has changed since, or Kafka refuses the proof. Of two that start at once, the one that
Kafka elected last claims last.
"""

from __future__ import annotations

import asyncio

from schemas.manifests import Fence
from streams.broker.leadership import Leadership
from streams.stores.artifacts.checkpoints import CheckpointStore
from streams.stores.artifacts.registry import ModelRegistry


async def claim_term(leadership: Leadership, checkpoints: CheckpointStore, registry: ModelRegistry) -> Fence:
    """Claim a term above all that snapshots and releases were written under; from here on the leader carries it.

    Raises `Fenced` if another process was elected meanwhile, `StoreUnavailable` and `BrokerUnavailable` if one of them
    does not answer: nothing is claimed then, or a term that nobody uses.
    """
    while True:
        seen = await asyncio.to_thread(checkpoints.last_claim)
        known = max(seen.term, await asyncio.to_thread(registry.last_term))
        await leadership.prove()
        assert leadership.fence is not None, "not elected"
        fence = leadership.fence.model_copy(update={"term": known + 1})
        if await asyncio.to_thread(checkpoints.claim, fence, seen=seen):
            return leadership.claimed(fence.term)
