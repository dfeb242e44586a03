"""When a release is made or put off, call by call, beside a trainer that says what is due."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import BrokerUnavailable, Fenced, StoreUnavailable
from streams.runtime.interval import IntervalTimer
from streams.training import release_schedule
from streams.training.release_schedule import ReleaseScheduler


class Parts:
    """Everything around a scheduler; `calls` are what it asked for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, every: float | None = None, until_end: bool = False) -> None:
        monkeypatch.setattr(release_schedule, "_WAIT_SECONDS", 0.0)
        monkeypatch.setattr(release_schedule, "_RETRY_SECONDS", 0.0)
        self.calls: list[str] = []
        self.away: dict[str, Exception] = {}
        self.now = 0.0
        self.due, self.beyond, self.checkpoint_is_written, self.taken_over, self.unfinished = (
            True,
            True,
            True,
            True,
            False,
        )
        self.settled, self.at_last_rows = True, False
        self.progress = SimpleNamespace(rows=50, rows_since_release=7)
        self.current_id: str | None = "r1"
        self.trainer: Any = SimpleNamespace(
            progress=self.progress, shadow=None, stand_in=None, release_due=lambda: self.due, encoder_version="e",
            begin_next=lambda: self.calls.append("next"), candidate=lambda: "candidate",
            catalogue=SimpleNamespace(dim=8), config=SimpleNamespace(pending_megabytes=100.0, history_length=20),
            intake=self,
        )  # fmt: skip
        thread: Any = SimpleNamespace(
            trainer=self.trainer, trained_offsets=lambda: {0: 9},
            candidate=lambda: self.calls.append("candidate") or ("candidate", {"behaviours": {0: 9}}),
        )  # fmt: skip
        given: Any = self
        timer = None if every is None else IntervalTimer(every, lambda: self.now)
        self.releases = ReleaseScheduler(
            thread, given, given, given, checkpointer=given, every=timer, until_end=until_end
        )

    def said(self) -> list[str]:
        calls = list(self.calls)
        self.calls.clear()
        return calls

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.away:
            raise self.away[name]

    # the publisher

    async def take_over(self, *, encoder_version: str, dim: int) -> None:
        assert (encoder_version, dim) == ("e", 8)
        self._call("take over")
        self.taken_over = True

    async def finish(self) -> None:
        self._call("finish")
        self.unfinished = False

    def beyond_current(self, offsets: Any) -> bool:
        assert offsets == {0: 9}
        return self.beyond

    async def say_not_beyond(self, candidate: Any) -> None:
        self._call("not beyond")

    async def segments(self) -> set[str]:
        return set()

    # the gate

    last_rows = 40

    async def admit(self, trainer: Any, candidate: Any, offsets: Any, *, more_rows: bool = True) -> None:
        assert (candidate, offsets) == ("candidate", {"behaviours": {0: 9}})
        self._call("admit" if more_rows else "admit the last")

    async def decide(self, trainer: Any) -> None:
        self._call("decide")
        trainer.shadow = None

    async def resume(self, trainer: Any, shadow: Any) -> None:
        self._call(f"resume {shadow}")

    async def give_up(self, trainer: Any, why: str) -> None:
        self._call("give up")
        trainer.shadow = None

    async def begin_last_rows(self, trainer: Any) -> None:
        self._call("last rows")

    # leadership, checkpoints, and the trainer's intake

    def confirm(self) -> None:
        self._call("confirm")

    async def before_release(self, thread: Any) -> bool:
        self._call("checkpoint")
        return self.checkpoint_is_written

    async def after_release(self, kept: Any) -> None:
        self._call("journals")

    def hold_back(self, rows: int) -> None:
        self.calls.append(f"hold back {rows}")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(monkeypatch)


RELEASED = ["checkpoint", "candidate", "admit", "next", "journals"]


async def test_a_release_follows_a_checkpoint_of_its_very_state_and_then_the_next_rows_begin(parts: Parts) -> None:
    assert await parts.releases.release_if_due(parts.trainer)
    assert parts.said() == RELEASED
    parts.due = False
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == []


@pytest.mark.parametrize("missing", ["taken_over", "settled", "not unfinished", "checkpoint_is_written"])
async def test_what_is_due_and_cannot_be_made_now_keeps_everything_from_being_learned(
    parts: Parts, missing: str
) -> None:
    name, value = (missing, False) if " " not in missing else ("unfinished", True)
    setattr(parts, name, value)
    assert not await parts.releases.release_if_due(parts.trainer)
    assert parts.said() == (["checkpoint"] if missing == "checkpoint_is_written" else [])
    setattr(parts, name, not value)
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == RELEASED


async def test_a_candidate_that_a_checkpoint_holds_is_offered_again_as_it_is(parts: Parts) -> None:
    parts.away["admit"] = StoreUnavailable("store", "away")
    assert not await parts.releases.release_if_due(parts.trainer)
    assert parts.said() == ["checkpoint", "candidate", "admit"]
    parts.due = False  # it waits all the same
    assert not await parts.releases.release_if_due(parts.trainer) and parts.said() == ["admit"]
    parts.away.clear()
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["admit", "next", "journals"]
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == []


async def test_journals_that_cannot_be_removed_now_put_nothing_off(parts: Parts) -> None:
    parts.away["journals"] = StoreUnavailable("disk", "away")
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == RELEASED


async def test_what_was_released_before_is_passed_over_up_to_its_end(parts: Parts) -> None:
    parts.beyond = False
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["next"]


async def test_one_candidate_at_a_time_is_compared_and_the_next_follows_its_decision(parts: Parts) -> None:
    parts.trainer.shadow = SimpleNamespace(complete=False)
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == []
    parts.trainer.shadow.complete, parts.settled = True, False
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == []
    parts.settled, parts.away["decide"] = True, StoreUnavailable("store", "away")
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["decide"]
    parts.away.clear()
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["decide", *RELEASED]


async def test_wall_time_makes_a_release_due_of_new_rows_alone_and_begins_anew_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = Parts(monkeypatch, every=60.0)
    parts.due = False
    for moment, rows, released in (
        (59, 7, False), (60, 0, False), (61, 7, True), (120, 7, False), (121, 7, True)
    ):  # fmt: skip
        parts.now, parts.progress.rows_since_release = moment, rows
        assert await parts.releases.release_if_due(parts.trainer)
        assert parts.said() == (RELEASED if released else [])


async def test_the_store_is_taken_over_once_and_then_what_a_checkpoint_compared_goes_on(parts: Parts) -> None:
    parts.taken_over = False
    parts.releases.resume("the shadow")  # type: ignore[arg-type]
    parts.away["take over"] = BrokerUnavailable("Kafka", "away")
    await parts.releases.catch_up()
    assert parts.said() == ["take over"]
    parts.away.clear()
    await parts.releases.catch_up()
    await parts.releases.catch_up()
    assert parts.said() == ["take over", "resume the shadow"]
    parts.unfinished = True
    await parts.releases.catch_up()
    assert parts.said() == ["finish"]


async def test_the_rest_of_a_log_is_released_once_leadership_is_settled(parts: Parts) -> None:
    parts.trainer.shadow = "compared"
    await parts.releases.release_rest(asyncio.Event())
    assert parts.said() == ["confirm", "give up", "checkpoint", "candidate", "admit the last", "next", "journals"]
    parts.away["give up"] = StoreUnavailable("store", "away")

    def back() -> None:
        parts.away.clear()

    asyncio.get_running_loop().call_soon(back)
    await parts.releases.release_rest(asyncio.Event())
    assert parts.said()[:4] == ["confirm", "give up", "confirm", "give up"]


@pytest.mark.parametrize("why", ["stopped", "no rows"])
async def test_a_run_that_was_stopped_or_learned_nothing_has_no_rest(parts: Parts, why: str) -> None:
    stop = asyncio.Event()
    if why == "stopped":
        stop.set()
    else:
        parts.progress.rows = 0
    await parts.releases.release_rest(stop)
    assert parts.said() == []


async def test_a_rest_that_is_not_new_is_said_so_and_a_lost_leadership_ends_it(parts: Parts) -> None:
    parts.beyond = False
    await parts.releases.release_rest(asyncio.Event())
    assert parts.said() == ["confirm", "give up", "not beyond", "next"]
    parts.progress.rows_since_release = 0  # all of it is in a release
    await parts.releases.release_rest(asyncio.Event())
    assert parts.said() == ["confirm", "give up", "next"]
    parts.away["confirm"] = Fenced("another process leads")
    with pytest.raises(Fenced):
        await parts.releases.release_rest(asyncio.Event())


async def test_a_half_made_release_is_finished_before_a_run_ends(parts: Parts) -> None:
    parts.progress.rows, parts.unfinished = 0, True
    await parts.releases.release_rest(asyncio.Event())
    assert parts.said() == ["finish"]


@pytest.mark.parametrize(("megabytes", "held"), [(100.0, 40), (1e-9, 1)])
async def test_the_last_rows_are_held_back_once_and_compared_again_when_another_release_serves(
    monkeypatch: pytest.MonkeyPatch, megabytes: float, held: int
) -> None:
    parts = Parts(monkeypatch, until_end=True)
    parts.due, parts.trainer.config.pending_megabytes = False, megabytes
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == [f"hold back {held}"]
    parts.at_last_rows, parts.settled = True, False
    assert not await parts.releases.release_if_due(parts.trainer) and parts.said() == []
    parts.settled, parts.away["last rows"] = True, StoreUnavailable("store", "away")
    assert not await parts.releases.release_if_due(parts.trainer) and parts.said() == ["last rows"]
    parts.away.clear()
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["last rows"]
    parts.at_last_rows = False
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == []
    parts.current_id = "r2"
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["last rows"]


async def test_while_the_last_rows_are_compared_no_other_candidate_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, until_end=True)
    parts.trainer.stand_in = "compared"
    assert await parts.releases.release_if_due(parts.trainer) and parts.said() == ["hold back 40"]
