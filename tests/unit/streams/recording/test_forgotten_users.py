"""When marks of erased users go, and that requests whose marks the store lost come again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from aiokafka import TopicPartition

from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.broker import topic_follower
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.recording.forgotten_users import CHECK_SECONDS, DROP_SECONDS, ErasureFollower
from streams.stores.histories.store import InMemoryBehaviourStore
from tests.factories.click_log import LOG, event
from tests.factories.fake_consumer import FakeConsumer, FakeRecord

FORGOTTEN = TopicPartition("mim.forgotten", 0)


class Place:
    """An erasure follower over a topic that holds one request: u1, below offset 5 of partition 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        request = ForgottenUser(
            user_id="u1", forgotten_at=at, cluster_id=LOG.cluster_id, topic_id=LOG.topic_id, ends={0: 5}
        )
        log = {FORGOTTEN: [FakeRecord(0, 0, b"u1", request.model_dump_json().encode())]}
        monkeypatch.setattr(topic_follower, "make_consumer", lambda *_: FakeConsumer(log))
        found = ClusterTopics("c", {"forgotten": "f"}, {"forgotten": [0]})
        monkeypatch.setattr(topic_follower, "describe_topics", lambda *_: found)
        self.store, self.begins, self.now = InMemoryBehaviourStore(), 0, 0.0
        self.follower = ErasureFollower(
            self.store, BrokerConfig(), TopicsConfig(), beginnings=self.beginnings, clock=lambda: self.now
        )

    async def beginnings(self) -> dict[int, int]:
        return {0: self.begins}

    async def replayed(self) -> int:
        """How many of the user's records a rebuild passes over."""
        await self.store.clear()
        await self.store.bind(LOG)
        return (await self.store.record(0, [event(n) for n in range(8)], first_offset=0, next_offset=8)).erased


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(monkeypatch)
    await place.store.bind(LOG)
    await place.follower.open()
    return place


async def test_an_erasure_is_kept_while_the_log_holds_what_it_erases(place: Place) -> None:
    for place.begins in (0, 4):
        await place.follower._run_once()
        place.now += DROP_SECONDS
        assert await place.replayed() == 5


async def test_an_erasure_is_dropped_within_an_hour_after_the_log_is_past_it(place: Place) -> None:
    await place.follower._run_once()
    assert await place.replayed() == 5
    place.begins = 5
    place.now += DROP_SECONDS - 1
    await place.follower._run_once()
    assert await place.replayed() == 5
    place.now += 1
    await place.follower._run_once()
    assert await place.replayed() == 0


async def test_requests_whose_marks_the_store_lost_are_applied_again(place: Place) -> None:
    place.store.__init__()  # type: ignore[misc]
    await place.store.bind(LOG)
    assert await place.replayed() == 0
    place.now += CHECK_SECONDS
    await place.follower._run_once()
    assert await place.replayed() == 5


async def test_a_login_that_may_not_look_through_the_marks_keeps_them_and_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*given: object, **named: object) -> int:
        raise Misconfigured("NOPERM: no permissions to run 'hscan'")

    monkeypatch.setattr(place.store, "drop_spent_marks", refused)
    place.begins = 5
    await place.follower._run_once()
    assert await place.replayed() == 5
