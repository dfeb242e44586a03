"""Bugs that the harness must find, planted into running processes from outside: the product has no hook for them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.faults.scenario import Fault


def acknowledged_before_write() -> None:
    """The index worker acknowledges a batch, and writes it a moment later."""
    from streams.indexing import agents as item_streams
    from streams.indexing.config import IndexReport

    write = item_streams.index_batch
    under_way = set()

    async def later(*given: Any) -> None:
        await asyncio.sleep(1.0)
        await write(*given)

    async def acknowledge_first(center: Any, records: Any, guard: Any, ahead: Any = None) -> IndexReport:
        task = asyncio.ensure_future(later(center, records, guard, None))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        return IndexReport(
            events=len(records), superseded=0, encoded=0, rewritten=0, pending=0, deleted=0, stale=0, image_retries=0
        )

    item_streams.index_batch = acknowledge_first  # type: ignore[assignment]


def search_acknowledged_before_announced() -> None:
    """The index worker acknowledges what was searched, and announces its vectors a moment later."""
    from streams.indexing.query_agent import QueryAnnouncer

    announce = QueryAnnouncer._announce
    under_way = set()

    async def later(self: QueryAnnouncer, *given: Any) -> None:
        await asyncio.sleep(1.0)
        await announce(self, *given)

    async def announce_later(self: QueryAnnouncer, *given: Any) -> None:
        task = asyncio.ensure_future(later(self, *given))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    QueryAnnouncer._announce = announce_later  # type: ignore[method-assign]


def bank_not_in_snapshot() -> None:
    """A trainer that goes on from a snapshot has an empty memory bank."""
    from trainer.negatives.memory_bank import TakeBank

    TakeBank.restore = lambda self, state: None  # type: ignore[method-assign]


def pointer_before_rename() -> None:
    """A release or snapshot becomes current a moment before it is there under its name."""
    from streams.stores.artifacts.artifact_store import FolderArtifactStore

    compare_and_swap = FolderArtifactStore.compare_and_swap

    def swap_first(self: FolderArtifactStore, content: bytes, *, expected: Any) -> bool:
        named = json.loads(content)
        entry = self.entry_folder(named.get("release_id") or named.get("snapshot_id") or "none")
        if not entry.exists():  # a trainer takes over before anything was written
            return compare_and_swap(self, content, expected=expected)
        unnamed = entry.with_name(f".late-{entry.name}")
        entry.rename(unnamed)
        try:
            return compare_and_swap(self, content, expected=expected)
        finally:
            time.sleep(0.2)
            unnamed.rename(entry)

    FolderArtifactStore.compare_and_swap = swap_first  # type: ignore[method-assign]


def zombie_writes() -> None:
    """An index worker never looks whether it was replaced; it also dawdles between its look at a row and its write."""
    from streams.indexing import flow, slots
    from streams.stores.vectors.milvus_index import MilvusItemIndex

    upsert = MilvusItemIndex.upsert

    async def held(self: slots.Slot) -> None:
        return None

    async def kept(self: slots.Slot) -> None:
        await asyncio.Event().wait()

    async def current() -> None:
        return None

    async def slow_upsert(self: MilvusItemIndex, rows: Any) -> None:
        await asyncio.sleep(0.2)
        await upsert(self, rows)

    slots.Slot.assert_held, slots.Slot.keep = held, kept  # type: ignore[method-assign]
    flow.Flow.guard = lambda self, epoch=None: current  # type: ignore[method-assign]
    MilvusItemIndex.upsert = slow_upsert  # type: ignore[method-assign]


def lost_tombstone() -> None:
    """Every third delete does not reach the center."""
    from streams.indexing import batch_plan

    newest_changes = batch_plan.newest_changes
    count = 0

    def some(*given: Any) -> Any:
        nonlocal count
        kept = []
        for change in newest_changes(*given):
            count += change.item is None
            if change.item is not None or count % 3:
                kept.append(change)
        return kept

    batch_plan.newest_changes = some


def event_id_ignored() -> None:
    """Trainer and recorder take a second delivery of an event for another event."""
    from streams.stores.histories import packed_history as takes
    from trainer.samples import window

    takes.hash_of = lambda event_id: os.urandom(8)
    window.id_hash = lambda event_id: int.from_bytes(os.urandom(8), "little")


class Bug(NamedTuple):
    """A bug and how it shows."""

    plant: Callable[[], None]
    """Changes the modules of this process so that they have it."""
    shown_by: Fault
    """A fault under which it shows; a round or two of it must find the bug."""
    signs: tuple[str, ...]
    """Words of which one must be in the violations: the harness says what is wrong, not only that something is."""


BUGS = {
    "acknowledged before write": Bug(
        acknowledged_before_write,
        "kill index",
        ("missing from the center", "not the newest published", "deleted items are in"),
    ),
    "search acknowledged before announced": Bug(
        search_acknowledged_before_announced, "kill index", ("searches have no vector",)
    ),
    "bank not in snapshot": Bug(
        bank_not_in_snapshot,
        "kill train",
        ("one that nothing happened to stands at", "other rows than an uninterrupted run"),
    ),
    "pointer before rename": Bug(
        pointer_before_rename, "kill train", ("the pointer named a release that was not there",)
    ),
    "zombie writes": Bug(zombie_writes, "zombie index", ("center verify mended", "goes on as if nothing had happened")),
    "lost tombstone": Bug(lost_tombstone, "kill serve", ("deleted items are in the center",)),
    "event_id ignored": Bug(event_id_ignored, "kill serve", ("learned from more than once",)),
}
