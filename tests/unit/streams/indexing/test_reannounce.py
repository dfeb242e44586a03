"""Announcing rows again beside the batches of the same worker."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from streams.indexing.reannounce import reannounce
from tests.factories.item_path import ItemPath, allowed


async def test_rows_are_not_announced_again_while_a_batch_is_being_written(path: ItemPath) -> None:
    await path.index_all(path.publish("a", title="old"))
    path.outbox.announced.clear()
    async with path.context.writing:
        telling = asyncio.create_task(reannounce(path.context, ["a", "gone"], allowed))
        for _ in range(20):
            await asyncio.sleep(0)
        assert path.outbox.announced == []
        path.rows["a"] = row = replace(path.rows["a"], title="new")
    await telling
    assert path.outbox.announced == [row, "gone"]
