"""What users took of an item that is deleted leaves Redis, whoever is killed meanwhile and however late it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from streams.settings import Settings
from streams.stores.histories.redis_store import RedisBehaviourStore
from tests.factories.item_feed import feeding
from tests.factories.recorded_log import behaviour_store, record, send
from tests.factories.topics import create_anew
from tests.factories.waiting import until

pytestmark = pytest.mark.timeout(240)

NEVER_LATE = {
    "MIM_RECORD__DELETED_GATHER_SECONDS": "0",
    "MIM_RECORD__DELETED_SWEEP_SECONDS": "86400",
    "MIM_RECORD__SESSION_TIMEOUT_MS": "6000",
}
AT_ONCE = {**NEVER_LATE, "MIM_RECORD__DELETED_SWEEP_SECONDS": "0.5"}
USERS = [f"u{n}" for n in range(30)]


def takes_of(item: str, number: int) -> list[tuple[bytes, bytes]]:
    return [record(user, f"{item}-{user}-{number}", item, number) for user in USERS]


class Looking:
    """Redis as serving sees it."""

    def __init__(self, store: RedisBehaviourStore) -> None:
        self._store = store

    async def items(self) -> set[tuple[str, ...]]:
        """The histories that there are."""
        return {tuple([take.item_id for take in await self._store.history(user)]) for user in USERS}

    async def wait_for(self, *histories: tuple[str, ...]) -> None:
        """Until all users have one of these."""
        await until(self.items, lambda found: found == set(histories))

    async def recorded(self, takes: int) -> None:
        """Until so many takes were recorded since the view began."""
        await until(self._store.counts, lambda counts: counts["takes"] == takes)


@pytest.fixture
async def redis(settings: Settings) -> AsyncIterator[Looking]:
    async with behaviour_store(settings) as store:
        yield Looking(store)


async def test_takes_of_a_deleted_item_leave_redis_however_late_they_come_and_a_rebuild_does_not_bring_them_back(
    settings: Settings, process: Callable[..., Any], redis: Looking
) -> None:
    async with feeding(settings) as feed:
        for item in ("stays", "goes", "returns"):
            await feed.publish(item, item)
        await send(settings, takes_of("stays", 1) + takes_of("goes", 2) + takes_of("returns", 3))
        recorder = process("record", env=NEVER_LATE)
        await redis.wait_for(("stays", "goes", "returns"))
        await feed.delete("goes")
        await feed.delete("returns")
        await redis.wait_for(("stays",))

        await feed.publish("returns", "again")
        await send(settings, takes_of("goes", 4) + takes_of("returns", 5))  # of a page that nobody reloaded
        await redis.wait_for(("stays", "goes", "returns"))
        recorder.kill()
        again = process("record", env=AT_ONCE)
        await redis.wait_for(("stays", "returns"))
        assert again.stop() == 0

        rebuilding = process("record", "--rebuild", env=AT_ONCE)
        rebuilding.wait_for("record.ready")  # the former view is gone
        await redis.recorded(5 * len(USERS))
        await redis.wait_for(("stays", "returns"))
        assert rebuilding.stop() == 0


async def test_a_deletion_is_swept_though_the_recorder_that_read_it_was_killed_and_two_share_the_work(
    settings: Settings, process: Callable[..., Any], redis: Looking
) -> None:
    async with feeding(settings) as feed:
        for item in ("first", "second", "stays"):
            await feed.publish(item, item)
        await send(settings, takes_of("first", 1) + takes_of("second", 2) + takes_of("stays", 3))
        gathers = {**NEVER_LATE, "MIM_RECORD__DELETED_GATHER_SECONDS": "86400"}
        reads = process("record", env=gathers)
        await redis.wait_for(("first", "second", "stays"))
        await feed.delete("first")
        reads.wait_for("takes.swept")  # the first is never waited for
        await redis.wait_for(("second", "stays"))
        await feed.delete("second")
        await until(reads.output, lambda output: output.count("items.marked_deleted") >= 2)
        reads.kill()
        assert await redis.items() == {("second", "stays")}

        both = [process("record", env=NEVER_LATE) for _ in range(2)]
        await redis.wait_for(("stays",))
        for recorder in both:
            recorder.wait_for("record.ready")
        await feed.delete("stays")
        await redis.wait_for(())
        assert sum("items.marked_deleted" in recorder.output() for recorder in both) == 1
        assert [recorder.stop() for recorder in both] == [0, 0]


async def test_deletions_are_followed_into_a_topic_that_was_created_again(
    settings: Settings, process: Callable[..., Any], redis: Looking
) -> None:
    recorder = process("record", env={**NEVER_LATE, "MIM_RECORD__IDENTITY_CHECK_SECONDS": "0.5"})
    async with feeding(settings) as feed:
        for n in range(40):
            await feed.publish(f"i{n}", "before")
        await send(settings, takes_of("goes", 1) + takes_of("stays", 2))
        await redis.wait_for(("goes", "stays"))
    create_anew(settings, "items")
    async with feeding(settings) as feed:
        await feed.delete("goes")
        await redis.wait_for(("stays",))
    assert recorder.stop() == 0
