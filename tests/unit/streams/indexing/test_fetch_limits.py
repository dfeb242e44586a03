"""Requests under way: each host as many as it takes, and waiting is no failure."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from schemas.errors import Reason, Unprocessable
from streams.indexing import fetch_limits
from streams.indexing.fetch_limits import (
    FIRST_LIMIT,
    LOWEST_LIMIT,
    QUIET_AFTER,
    STEP,
    ByteRoom,
    FetchFailed,
    HostLimit,
    Lane,
)
from tests.factories.waiting import Clock

pytestmark = pytest.mark.timeout(30)  # a fault in a queue shows as a wait without end

QUIET_SECONDS = 10.0


def lane(clock: Clock, *, most: int = 256, tries: int = 1) -> Lane:
    return Lane(most=most, most_per_host=128, quiet_seconds=QUIET_SECONDS, tries=tries, clock=clock)


def limit(clock: Clock | None = None, most: int = 128) -> HostLimit:
    return HostLimit(most, quiet_seconds=QUIET_SECONDS, clock=clock or Clock())


class Requests:
    """Requests that a test answers, and how many of them are under way."""

    def __init__(self) -> None:
        self.open: list[asyncio.Future[bytes]] = []
        self.running = self.most_running = self.sent = 0

    async def __call__(self) -> bytes:
        self.running += 1
        self.sent += 1
        self.most_running = max(self.most_running, self.running)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.open.append(answer)
        try:
            return await answer
        finally:
            self.running -= 1

    async def answer_all(self, error: Exception | None = None) -> None:
        await settled()
        while self.open:
            waiting, self.open = self.open, []
            for one in waiting:
                if one.done():
                    continue
                one.set_exception(error) if error is not None else one.set_result(b"")
            await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def failed(*, overload: bool = True, again: bool = False) -> FetchFailed:
    return FetchFailed("http://x.test", "no", overload=overload, again=again)


def answering(*answers: Exception | bytes) -> Callable[[], Awaitable[bytes]]:
    left = list(answers)

    async def request() -> bytes:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return request


class TestLimitOfAHost:
    async def round(self, one: HostLimit, overloads: int, *, waiting: int = 0) -> None:
        """As many answers as are allowed at a time, some of them signs of overload."""
        size = one.limit
        for _ in range(size):
            await one.enter()
        tasks = [asyncio.create_task(one.enter()) for _ in range(waiting)]
        await settled()
        for n in range(size):
            one.learn(overload=n < overloads)
        for _ in range(size):
            one.leave()
        await settled()
        for task in tasks:
            await task
            one.leave()

    async def test_it_grows_by_a_step_after_a_clean_round_in_which_requests_waited(self) -> None:
        one = limit()
        await self.round(one, 0)
        assert one.limit == FIRST_LIMIT
        await self.round(one, 0, waiting=1)
        assert one.limit == FIRST_LIMIT + STEP
        for _ in range(20):
            await self.round(one, 0, waiting=1)
        assert one.limit == 128

    async def test_it_halves_when_more_than_a_quarter_of_a_round_fails_and_keeps_a_rest(self) -> None:
        one = limit()
        await self.round(one, FIRST_LIMIT // 4 + 1)
        assert one.limit == FIRST_LIMIT // 2
        for _ in range(5):
            await self.round(one, one.limit)
        assert one.limit == LOWEST_LIMIT

    async def test_a_few_failures_say_nothing_about_load(self) -> None:
        one = limit()
        for number in range(1, 4):
            await self.round(one, one.limit // 4, waiting=1)
            assert one.limit == FIRST_LIMIT + number * STEP

    async def test_whoever_waits_comes_before_the_next_and_a_limit_that_grew_lets_several_go(self) -> None:
        one, order = limit(), list[int]()
        for _ in range(FIRST_LIMIT):
            await one.enter()

        async def enter(number: int) -> None:
            await one.enter()
            order.append(number)

        tasks = [asyncio.create_task(enter(number)) for number in range(3)]
        await settled()
        for _ in range(FIRST_LIMIT):
            one.learn(overload=False)
        assert one.limit == FIRST_LIMIT + STEP
        tasks.append(asyncio.create_task(enter(3)))
        await settled()
        assert order == []
        one.leave()
        await asyncio.wait_for(asyncio.gather(*tasks), 1)
        assert order == [0, 1, 2, 3]

    async def test_it_never_begins_above_what_is_set(self) -> None:
        one = limit(most=2)
        assert one.limit == 2
        await self.round(one, 2)
        assert one.limit == 2

    async def test_who_is_cancelled_in_the_queue_or_at_its_turn_takes_no_turn_with_it(self) -> None:
        one = limit(most=1)
        await one.enter()
        queued, next_in_line, last = (asyncio.create_task(one.enter()) for _ in range(3))
        await settled()
        queued.cancel()
        await settled()
        assert not next_in_line.done()
        one.leave()  # gives the turn to the next in line ...
        next_in_line.cancel()  # ... who is cancelled before it runs
        await asyncio.wait_for(last, 1)
        one.leave()
        assert one.is_idle

    def test_the_first_answer_of_one_still_under_way_ends_the_quiet(self) -> None:
        one = limit()
        for _ in range(QUIET_AFTER):
            assert not one.is_quiet
            one.learn(overload=True)
        assert one.is_quiet and not one.answers_others
        one.learn(overload=False)
        assert not one.is_quiet and one.answers_others


class TestLane:
    async def test_hundreds_are_under_way_and_the_rest_waits_without_failing(self) -> None:
        requests, asked = Requests(), lane(Clock(), most=200)
        tasks = [asyncio.create_task(asked.ask("u", f"host-{n % 10}.test", requests)) for n in range(1_000)]
        await requests.answer_all()
        assert await asyncio.gather(*tasks) == [b""] * 1_000
        assert requests.most_running == 200

    async def test_a_host_that_gives_no_answer_is_left_alone_and_holds_no_other_up(self) -> None:
        clock, dead, fine = Clock(), Requests(), Requests()
        asked = lane(clock)
        at_dead = [asyncio.create_task(asked.ask("u", "dead.test", dead)) for _ in range(300)]
        at_fine = [asyncio.create_task(asked.ask("u", "fine.test", fine)) for _ in range(300)]
        await fine.answer_all()
        assert await asyncio.gather(*at_fine) == [b""] * 300
        await dead.answer_all(failed())
        outcomes = await asyncio.gather(*at_dead, return_exceptions=True)
        assert all(isinstance(outcome, FetchFailed) for outcome in outcomes)
        assert dead.sent == FIRST_LIMIT  # one time-out for 300 pictures

    async def test_a_quiet_host_is_asked_again_after_its_time_and_one_answer_is_enough(self) -> None:
        clock = Clock()
        asked = lane(clock)
        for _ in range(QUIET_AFTER):
            with pytest.raises(FetchFailed):
                await asked.ask("u", "x.test", answering(failed()))
        with pytest.raises(FetchFailed, match="lately"):
            await asked.ask("u", "x.test", answering())
        clock.now += QUIET_SECONDS
        with pytest.raises(FetchFailed, match="no"):
            await asked.ask("u", "x.test", answering(failed()))
        with pytest.raises(FetchFailed, match="lately"):  # one more without an answer
            await asked.ask("u", "x.test", answering())
        clock.now += QUIET_SECONDS
        assert await asked.ask("u", "x.test", answering(b"1")) == b"1"
        with pytest.raises(FetchFailed, match="no"):
            await asked.ask("u", "x.test", answering(failed()))
        assert await asked.ask("u", "x.test", answering(b"2")) == b"2"

    @pytest.mark.parametrize("answer", [b"", failed(overload=False), Unprocessable(Reason.IMAGE_REFUSED, "gone")])
    async def test_any_answer_between_failures_shows_that_the_host_is_there(self, answer: Exception | bytes) -> None:
        asked = lane(Clock())
        for turn in [*[failed()] * (QUIET_AFTER - 1), answer, failed(), failed()]:
            await asyncio.gather(asked.ask("u", "x.test", answering(turn)), return_exceptions=True)
        assert not asked.host("x.test").is_quiet

    async def test_a_failure_of_the_moment_is_repeated_once_where_the_host_answers_others(self) -> None:
        asked, moment = lane(Clock(), tries=2), failed(overload=False, again=True)
        assert await asked.ask("u", "x.test", answering(moment, b"1")) == b"1"
        with pytest.raises(FetchFailed):
            await asked.ask("u", "x.test", answering(moment, moment, b"too late"))
        with pytest.raises(FetchFailed):
            await asked.ask("u", "x.test", answering(failed(overload=False), b"not asked for"))

    async def test_a_host_that_answers_nobody_is_not_asked_twice(self) -> None:
        asked, sent = lane(Clock(), tries=2), 0

        async def dead() -> bytes:
            nonlocal sent
            sent += 1
            raise failed(again=True)

        counts = []
        for _ in range(QUIET_AFTER):
            with pytest.raises(FetchFailed):
                await asked.ask("u", "x.test", dead)
            counts.append(sent)
        assert counts == [2, 4, 5, 6, 7, QUIET_AFTER, QUIET_AFTER, QUIET_AFTER]  # at first it may be the picture

    async def test_the_host_that_was_asked_longest_ago_is_forgotten_first(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch_limits, "MAX_HOSTS", 3)
        asked = lane(Clock())
        first, second, _ = (asked.host(name) for name in ("1.test", "2.test", "3.test"))
        assert asked.host("1.test") is first
        asked.host("4.test")
        assert asked.host("1.test") is first and asked.host("2.test") is not second

    @pytest.mark.parametrize("error", [failed(), Unprocessable(Reason.IMAGE_REFUSED, "no"), KeyError("a bug"), None])
    async def test_however_a_request_ends_its_turn_goes_to_the_next(self, error: Exception | None) -> None:
        asked, requests = Lane(most=1, most_per_host=1, quiet_seconds=9, tries=1, clock=Clock()), Requests()
        first = asyncio.create_task(asked.ask("u", "x.test", requests))
        await settled()
        first.cancel() if error is None else requests.open[0].set_exception(error)
        await asyncio.wait([first])
        async with asyncio.timeout(1):
            assert await asked.ask("u", "x.test", answering(b"1")) == b"1"
        assert asked.host("x.test").is_idle

    async def test_hosts_are_forgotten_and_never_one_with_requests_under_way(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch_limits, "MAX_HOSTS", 3)
        asked, requests = lane(Clock()), Requests()
        busy = asyncio.create_task(asked.ask("u", "busy.test", requests))
        await settled()
        kept = asked.host("busy.test")
        for n in range(10):
            await asked.ask("u", f"{n}.test", answering(b""))
        assert asked.host("busy.test") is kept
        assert len(asked._hosts) == 3
        await requests.answer_all()
        await busy


class TestByteRoom:
    async def test_what_is_held_never_exceeds_the_room_and_a_large_one_is_not_overtaken(self) -> None:
        room, order = ByteRoom(10), list[str]()
        held: Counter[str] = Counter()
        release = {name: asyncio.Event() for name in ("first", "large", "small")}

        async def hold(name: str, size: int) -> None:
            async with room.hold(size):
                order.append(name)
                held[name] = size
                assert held.total() <= 10
                await release[name].wait()
                del held[name]

        tasks = [asyncio.create_task(hold(*one)) for one in (("first", 6), ("large", 8), ("small", 1))]
        await settled()
        assert order == ["first"]
        for name in ("first", "large", "small"):
            release[name].set()
            await settled()
        await asyncio.gather(*tasks)
        assert order == ["first", "large", "small"]

    async def test_one_that_is_larger_than_the_room_takes_all_of_it(self) -> None:
        room = ByteRoom(10)
        async with room.hold(50):
            waiting = asyncio.create_task(room.hold(1).__aenter__())
            await settled()
            assert not waiting.done()
        await asyncio.wait_for(waiting, 1)

    async def test_one_that_gives_up_waiting_leaves_its_place(self) -> None:
        room = ByteRoom(10)
        async with room.hold(10):
            given_up = asyncio.create_task(room.hold(10).__aenter__())
            await settled()
            given_up.cancel()
            await settled()
        async with asyncio.timeout(1), room.hold(10):  # there is room again, and no more than before
            second = asyncio.create_task(room.hold(1).__aenter__())
            await settled()
            assert not second.done()
        await asyncio.wait_for(second, 1)
