"""Announcing what the center holds, because what was announced last may not be so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streams.indexing.context import Guard, IndexContext
from streams.runtime.delivery import retry_until_available
from streams.stores.vectors.item_index import ItemRow


async def reannounce(context: IndexContext, item_ids: Sequence[str], guard: Guard) -> None:
    """Announce the rows of these items, and again while somebody changes them.

    Whatever a worker writes after the last look, it announces later than we did. Raises `Fenced` from `guard`.
    """
    async with context.writing:
        rows = await _rows(context, item_ids)
        waiting = list(item_ids)
        while waiting:
            held = [rows[name] for name in waiting if name in rows and not rows[name].is_pending]
            gone = [name for name in waiting if name not in rows or rows[name].is_pending]

            async def announce(held: Sequence[ItemRow] = held, gone: Sequence[str] = gone) -> None:
                await guard()
                await context.outbox.announce(held, gone)

            await retry_until_available(announce, what="embeddings.announce", patience=context.patience)
            found = await _rows(context, waiting)
            waiting = [name for name in waiting if _source(found, name) != _source(rows, name)]
            rows = found


async def _rows(context: IndexContext, item_ids: Sequence[str]) -> Mapping[str, ItemRow]:
    return await retry_until_available(
        lambda: context.index.fetch(list(item_ids), pending=True), what="center.fetch", patience=context.patience
    )


def _source(rows: Mapping[str, ItemRow], item_id: str) -> tuple[int, int] | None:
    row = rows.get(item_id)
    return None if row is None else (row.source_partition, row.source_offset)
