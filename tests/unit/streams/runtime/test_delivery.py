"""Delivery: what is retried, what is quarantined, what passes through."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import Fenced, Reason, StoreUnavailable, Unprocessable, WriteRejected
from streams.runtime.delivery import BackOffConfig, DeliveryReport, Patience, deliver, retry_until_available


class Waits:
    """A sleep that only records its calls."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)

    @property
    def patience(self) -> Patience:
        return Patience(
            BackOffConfig(initial_seconds=1, factor=2, max_seconds=5, jitter=0.5), sleep=self, draw=lambda: 0.0
        )


class Sink:
    """A store that refuses some items, is away for some calls, and remembers."""

    def __init__(self, poison: set[int] = frozenset(), away_for: int = 0) -> None:  # type: ignore[assignment]
        self.poison, self.away_for = poison, away_for
        self.written: list[int] = []
        self.quarantined: list[int] = []
        self.calls = 0

    async def write(self, items: Sequence[int]) -> None:
        self.calls += 1
        if self.away_for:
            self.away_for -= 1
            raise StoreUnavailable("sink", "away")
        if self.poison & set(items):
            raise WriteRejected(Reason.WRITE_REJECTED, "poison")
        self.written += items

    async def quarantine(self, item: int, error: Unprocessable) -> None:
        assert error.reason is Reason.WRITE_REJECTED
        self.quarantined.append(item)

    async def take(self, items: Sequence[int], waits: Waits) -> DeliveryReport[int]:
        return await deliver(items, write=self.write, quarantine=self.quarantine, what="test", patience=waits.patience)


async def test_a_poison_item_never_takes_its_63_neighbours_along() -> None:
    sink = Sink({17})
    report = await sink.take(range(64), Waits())
    assert sink.quarantined == [17]
    assert sink.written == [n for n in range(64) if n != 17]
    assert report.delivered == tuple(sink.written)
    assert report.quarantined == (17,)
    assert sink.calls <= 2 * 6 + 1  # by halving, not one by one


@given(n=st.integers(0, 40), poison=st.sets(st.integers(0, 40)))
def test_each_item_is_either_written_or_quarantined_in_order(n: int, poison: set[int]) -> None:
    sink = Sink(poison)
    asyncio.run(sink.take(range(n), Waits()))
    assert sink.written == [i for i in range(n) if i not in poison]
    assert sink.quarantined == [i for i in range(n) if i in poison]


async def test_waits_grow_up_to_a_bound() -> None:
    sink, waits = Sink(away_for=5), Waits()
    report = await sink.take([1, 2], waits)
    assert waits.seconds == [1, 2, 4, 5, 5]
    assert sink.written == [1, 2]
    assert (report.retries, report.waited_seconds) == (5, 17)


async def test_a_store_that_goes_away_between_halves_loses_nothing() -> None:
    sink = Sink({2})
    calls = 0

    async def write(items: Sequence[int]) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3, 5):
            raise StoreUnavailable("sink", "away")
        await sink.write(items)

    await deliver([0, 1, 2, 3], write=write, quarantine=sink.quarantine, what="test", patience=Waits().patience)
    assert sorted(sink.written) == [0, 1, 3]
    assert sink.quarantined == [2]


async def test_a_quarantine_that_is_away_is_waited_for_too() -> None:
    sink, waits = Sink({0}), Waits()
    attempts = 0

    async def quarantine(item: int, error: Unprocessable) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise StoreUnavailable("letters", "away")
        await sink.quarantine(item, error)

    report = await deliver([0, 1], write=sink.write, quarantine=quarantine, what="test", patience=waits.patience)
    assert sink.quarantined == [0]
    assert sink.written == [1]
    assert len(waits.seconds) == report.retries == 2 and report.waited_seconds == sum(waits.seconds)


async def test_jitter_shortens_waits_by_at_most_its_share() -> None:
    config = BackOffConfig(initial_seconds=1, factor=2, max_seconds=5, jitter=0.5)
    assert config.wait_seconds(1, 0.0) == 1
    assert config.wait_seconds(1, 0.999) == pytest.approx(0.5, abs=1e-2)
    assert config.wait_seconds(10_000, 0.0) == 5


@pytest.mark.parametrize(("asked_for", "waited"), [(30, 30), (0.5, 1), (1, 1)])
async def test_a_retry_after_of_the_server_is_respected_and_shortens_no_wait(asked_for: float, waited: float) -> None:
    waits = Waits()
    answers = iter([StoreUnavailable("s", "busy", retry_after_seconds=asked_for), None])

    async def once() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "done"

    told: list[float] = []
    assert await retry_until_available(once, what="test", patience=waits.patience, waits=told) == "done"
    assert waits.seconds == told == [waited]


@pytest.mark.parametrize("error", [Fenced("taken over"), ZeroDivisionError()])
async def test_other_errors_pass_through_and_nothing_is_quarantined(error: Exception) -> None:
    sink = Sink()

    async def write(items: Sequence[int]) -> None:
        raise error

    with pytest.raises(type(error)):
        await deliver([1, 2], write=write, quarantine=sink.quarantine, what="test", patience=Waits().patience)
    assert sink.quarantined == []


async def test_cancellation_passes_through_a_wait() -> None:
    sink = Sink(away_for=10_000)
    patience = Patience(BackOffConfig(initial_seconds=60, max_seconds=60))
    task = asyncio.create_task(
        deliver([1], write=sink.write, quarantine=sink.quarantine, what="test", patience=patience)
    )
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sink.written == sink.quarantined == []
