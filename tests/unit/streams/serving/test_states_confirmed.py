"""Since when the copies of states are known to hold all that their topic held."""

from __future__ import annotations

import asyncio

from schemas.errors import BrokerUnavailable
from schemas.item_states import StateHead
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.serving.states_follower import StatesFollower
from tests.factories.fake_consumer import FakeRecord
from tests.factories.serving import FEATURES
from tests.factories.state_pipe import CONFIG, TAKES, Pipe


class Slow:
    """A topic of which each fetch takes five seconds and all that is there; some fetches fail."""

    def __init__(self, *, away: tuple[int, ...] = (), confirmations: int = 1) -> None:
        self.now, self.stop = 0.0, asyncio.Event()
        self.asked = self.looks = self.polls = 0
        self.left, self.away = confirmations, away

    async def ends(self) -> dict[object, int]:
        self.asked += 1
        return {}

    async def poll(self, *, wait_seconds: float) -> None:
        await asyncio.sleep(0)
        self.now, self.polls = self.now + 5, self.polls + 1
        if self.polls in self.away:
            raise BrokerUnavailable("Kafka", "away")

    async def has_reached(self, ends: object) -> bool:
        self.left -= 1
        if not self.left:
            self.stop.set()
        return True

    async def is_same_topic(self) -> bool:
        self.looks += 1
        return True


async def followed(topic: Slow) -> StatesFollower:
    states = StatesFollower(
        FEATURES, BrokerConfig(), TopicsConfig(), clock=lambda: topic.now, confirm_every_seconds=1, retry_seconds=0.001
    )
    async with asyncio.timeout(5):
        await states._follow(topic, topic.stop)  # type: ignore[arg-type]
    return states


async def test_copies_are_as_old_as_the_question_what_the_topic_holds_and_not_as_its_last_record() -> None:
    states = await followed(Slow())
    assert states.behind_seconds == 5
    states.copies.head = StateHead(number=3, before=99, left=0, log="log")
    assert (states.report().number, states.report().items, states.report().behind_seconds) == (3, 0, 5)


async def test_after_a_broker_was_away_it_is_asked_anew_what_the_topic_holds_and_once_whether_it_is_the_same() -> None:
    topic = Slow(away=(1, 3), confirmations=3)
    states = await followed(topic)
    assert (topic.polls, topic.asked, topic.looks) == (5, 5, 2) and states.behind_seconds == 5


async def test_requests_are_answered_while_many_records_are_applied() -> None:
    states = StatesFollower(CONFIG, BrokerConfig(), TopicsConfig(), clock=lambda: 0.0)
    turns = 0

    async def answer() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    answering = asyncio.create_task(answer())
    await states._apply([FakeRecord(0, n, b"0123456789abcdef:head", None) for n in range(2_001)], "source", 2_001)
    answering.cancel()
    assert turns >= 4


async def test_of_a_topic_that_was_left_before_its_first_head_nothing_is_in_the_copies_of_the_next() -> None:
    pipe = Pipe()
    states = StatesFollower(CONFIG, BrokerConfig(), TopicsConfig(), clock=lambda: 0.0)
    pipe.count(TAKES[:50])
    pipe.write()
    *items, (key, head) = pipe.topic
    await states._apply([FakeRecord(0, n, *record) for n, record in enumerate(items)], "source", 0)
    states._begin()
    assert states.is_reading
    await states._apply([FakeRecord(0, 0, key, head)], "source", 0)
    states._confirm(0.0)
    assert states.report().items == 0 and states.copies.complete and not states.is_reading


async def test_copies_of_no_item_are_read_anew_from_nothing() -> None:
    states = StatesFollower(CONFIG, BrokerConfig(), TopicsConfig(), clock=lambda: 0.0)
    pipe = Pipe()
    pipe.count(TAKES[:50])
    pipe.write()
    heads = [record for record in pipe.topic if b"head" in record[0]][-1:]
    assert heads, [key for key, _ in pipe.topic][-1]
    await states._apply([FakeRecord(0, 0, *heads[0])], "source", 1)
    states._confirm(0.0)
    assert states.copies.head is not None and len(states.copies) == 0 and not states.is_reading
    states._begin()
    assert states.copies.head is None and states.is_reading
