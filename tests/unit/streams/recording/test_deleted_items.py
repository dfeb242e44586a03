"""When takes of deleted items are swept, and what a record of `items` says of its item."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.recording.config import RecordConfig
from streams.recording.deleted_items import DeletedItemFollower, read_deletions, sweep_due
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.histories.deleted_items import InMemoryDeletedItems, SweepReport, Sweeps
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.fake_consumer import FakeRecord

Raw = partial(FakeRecord, 0, 0)


def test_the_last_record_of_an_item_says_whether_it_is_deleted_and_nothing_is_decoded() -> None:
    records = [
        Raw(b"gone", b"{}"),
        Raw(b"gone", None, 7_250),
        Raw(b"back", None, 5_500),
        Raw(b"back", b"not even JSON"),
        Raw(None, None),
        Raw(b"\xff", None),
        Raw(b"", None),
    ]
    assert read_deletions(records, now=9.0) == {"gone": 7.25, "back": None}


def test_a_deletion_whose_record_has_no_usable_timestamp_is_one_of_now() -> None:
    for timestamp in (-1, -62_135_600_400_000, 1_767_225_600_000_000):
        assert read_deletions([Raw(b"gone", None, timestamp)], now=9.0) == {"gone": 9.0}


@pytest.mark.parametrize(
    ("state", "now", "due"),
    [
        (Sweeps(0, "0:3", None, None), 0.0, False),
        (Sweeps(1, "0:3", None, None), 0.0, True),
        (Sweeps(1, "0:3", "0:2", 100.0), 129.0, False),
        (Sweeps(1, "0:3", "0:2", 100.0), 130.0, True),
        (Sweeps(1, "1:3", "0:3", 100.0), 130.0, True),
        (Sweeps(1, "0:3", "0:3", 100.0), 999.0, False),
        (Sweeps(1, "0:3", "0:3", 100.0), 1_000.0, True),
        (Sweeps(1, "0:3", "0:3", 100.0), 99.0, True),
    ],
    ids=["no marks", "first", "gathers", "new marks", "rebuilt", "nothing new", "late takes", "clock set back"],
)
def test_new_marks_are_swept_soon_and_old_ones_again_later(state: Sweeps, now: float, due: bool) -> None:
    assert sweep_due(state, now, gather_seconds=30.0, late_seconds=900.0) is due


class SlowSweeps(InMemoryDeletedItems):
    """Ten pages of users, and a stop after some of them."""

    def __init__(self, stop: asyncio.Event, pages: int) -> None:
        super().__init__(InMemoryBehaviourStore(BehaviourStoreConfig()))
        self.stop, self.pages, self.asked = stop, pages, list[int]()

    async def sweep(self, cursor: int) -> tuple[int, int]:
        self.asked.append(cursor)
        if len(self.asked) == self.pages:
            self.stop.set()
        return (cursor + 1) % 10, 1


async def test_a_restarted_process_goes_on_with_the_sweep_where_it_stopped() -> None:
    stop = asyncio.Event()
    items = SlowSweeps(stop, pages=4)
    await items.mark({"a": 1.0}, source="t:0", next_offset=1)
    reports: list[SweepReport] = []

    def follower() -> DeletedItemFollower:
        return DeletedItemFollower(
            items,
            BrokerConfig(),
            TopicsConfig(),
            RecordConfig(),
            member="m",
            clock=lambda: 5.0,
            on_report=reports.append,
        )

    await follower()._sweep(stop)
    assert (items.asked, reports) == ([0, 1, 2, 3], [])
    await items.mark({"b": 1.0}, source="t:0", next_offset=2)
    await follower()._sweep(asyncio.Event())
    assert items.asked == list(range(10))
    state = await items.sweeps()
    assert (len(reports), state.unfinished, state.swept_marks, state.marks) == (1, None, "1", "2")
