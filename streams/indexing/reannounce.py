"""Announcing what the center holds, because the last announcement may differ from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streams.indexing.context import Guard, IndexContext
from streams.indexing.guarded_writer import GuardedWriter
from streams.stores.vectors.item_index import ItemRow


async def reannounce(context: IndexContext, item_ids: Sequence[str], guard: Guard) -> None:
    """Announce the rows of these items, and again as long as they change meanwhile.

    What another worker writes after the last read, it also announces after this. Raises `Fenced` from `guard`.
    """
    writer = GuardedWriter(context, guard)
    async with context.writing:
        rows = await context.read_rows(item_ids, what="center.fetch")
        waiting = list(item_ids)
        while waiting:
            held = [rows[name] for name in waiting if name in rows and rows[name].is_searchable]
            gone = [name for name in waiting if name not in rows or not rows[name].is_searchable]
            await writer.announce(held, gone)
            found = await context.read_rows(waiting, what="center.fetch")
            waiting = [name for name in waiting if _source(found, name) != _source(rows, name)]
            rows = found


def _source(rows: Mapping[str, ItemRow], item_id: str) -> tuple[int, int] | None:
    row = rows.get(item_id)
    return None if row is None else (row.source_partition, row.source_offset)
