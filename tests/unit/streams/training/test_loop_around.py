"""What the training loop does around its trainer: reports, journals without releases, users who ask meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Misconfigured, StoreUnavailable
from streams.runtime.interval import IntervalTimer
from streams.training import reports as reports_module
from streams.training.loop import TrainingLoop
from streams.training.reports import NO_COUNTS, TrainReport, TrainReports
from tests.factories.samples import small_config
from tests.factories.training import (
    ALL,
    ListedInput,
    ToldAtOnce,
    forgotten,
    make_log,
    make_loop,
    make_thread,
    trained,
    vectors,
)
from trainer.online.intake import EventCounts
from trainer.samples.forgotten import ForgottenUsers


def test_a_report_has_each_figure_where_it_belongs() -> None:
    counts = EventCounts(received=21, trained=1, late=2, duplicate=3, dead_lettered=4, erased=5, pending=6)
    late = SimpleNamespace(by_partition={0: 6}, newest=["an event"])
    window = SimpleNamespace(ids_dropped=7)
    intake = SimpleNamespace(counts=counts, kinds=Counter(click=8), late=late, takes_too_late=9, window=window)
    taken = SimpleNamespace(snapshot=lambda: {"cart": (15, 16)})
    progress = SimpleNamespace(taken=taken, corrected=10, upgraded=11, steps=12, rows=13, rows_sha256="abc")
    thread: Any = SimpleNamespace(
        trainer=SimpleNamespace(intake=intake, progress=progress, trees="some"),
        report_offsets=lambda: {"behaviours": {0: 14}}, last_event_at=15,
        waits=SimpleNamespace(timeouts=16), metrics={"auc": 0.5},
    )  # fmt: skip
    publisher = SimpleNamespace(released=17, refused=18, held=19, current_id="r20", not_serving="why")
    reads: Any = SimpleNamespace(
        transactions=SimpleNamespace(open=21), broken_vectors=22, other_encoders=23, bounded=True
    )
    releases: Any = SimpleNamespace(publisher=publisher)
    reports = TrainReports(interval=IntervalTimer(1, lambda: 0.0))
    loop = TrainingLoop(reads, thread, reports, releases=releases, clock=lambda: 24.0)
    loop._missing = frozenset(["i1", "i2"])
    report = loop.report()
    assert report == TrainReport(
        accounts=report.accounts, kinds={"click": 8}, late_by_partition={0: 6}, late_events=("an event",),
        offsets={"behaviours": {0: 14}}, corrected=10, upgraded=11, takes={"cart": (15, 16)}, takes_too_late=9,
        steps=12, rows_trained=13, rows_sha256="abc", releases=17, refused=18, held=19, release_id="r20",
        not_serving="why", last_event_at=15, waiting_for=2, given_up=16, ids_forgotten=7, open_transactions=21,
        broken_vectors=22, other_encoders=23,
        prequential={"auc": 0.5}, updated_at=24.0, trees="some",
    )  # type: ignore[arg-type]  # fmt: skip
    assert report.accounts == {"received": 21, "trained": 1, "late": 2, "duplicate": 3, "dead_lettered": 4,
                               "erased": 5, "pending": 6}  # fmt: skip
    thread.trainer = None
    assert TrainingLoop(reads, thread, reports, clock=lambda: 1.0).report().accounts == NO_COUNTS


async def test_without_releases_the_journal_begins_anew_whenever_a_release_would_have_been_due() -> None:
    config = small_config(batch_rows=16, release_every_rows=32)
    thread = make_thread(given := ListedInput(vectors(*ALL), make_log(200)), config)
    report = await trained(make_loop(given, thread))
    assert thread.trainer is not None and report.rows_trained > 3 * 32
    assert thread.trainer.progress.rows_since_release <= 32


async def test_no_checkpoint_is_written_where_a_release_is_due_which_takes_its_own() -> None:
    beside_a_release: list[bool] = []

    class Checkpoints:
        just_written = False

        def due(self, thread: Any) -> bool:
            return True

        async def checkpoint(self, thread: Any) -> bool:
            beside_a_release.append(thread.trainer.release_due())
            return True

        async def written(self) -> bool:
            return True

        def cancel(self) -> None: ...

    config = small_config(batch_rows=16, release_every_rows=32)
    thread = make_thread(given := ListedInput(vectors(*ALL), make_log(200)), config)
    await trained(make_loop(given, thread, checkpointer=Checkpoints()))
    *before, _last = beside_a_release  # the last one is written whatever is due
    assert before == [False, False]


async def test_a_user_who_asks_while_a_release_waits_is_forgotten_and_nothing_is_learned() -> None:
    waits = asyncio.Event()

    class Waiting:
        publisher = SimpleNamespace(released=0, refused=0, held=0, current_id=None, not_serving=None)

        def resume(self, shadow: object) -> None: ...

        async def catch_up(self) -> None: ...

        async def release_if_due(self, trainer: Any) -> bool:
            return trainer.progress.rows < 32 or waits.is_set()

        async def release_rest(self, stop: asyncio.Event) -> None: ...

    seconds = iter(range(10**9, 2 * 10**9, 60))
    given = ListedInput(vectors(*ALL), make_log(300))
    thread = make_thread(given, small_config(batch_rows=16), forgotten=ForgottenUsers("c", "t"))
    with capture_logs() as said:
        loop = make_loop(
            given, thread, releases=Waiting(), clock=lambda: float(next(seconds)),
            follow=lambda tell: ToldAtOnce(tell, [], [forgotten("u3", until=10_000)],
                                           when=lambda: loop.report().rows_trained >= 32),
        )  # fmt: skip
        running = asyncio.create_task(loop.run(asyncio.Event()))
        async with asyncio.timeout(60):
            while not any(line["event"] == "train.user_forgotten" for line in said):
                assert not running.done()
                await asyncio.sleep(0.001)
        rows = loop.report().rows_trained
        assert 32 <= rows < 48
        waits.set()
        await asyncio.wait_for(running, 60)
    assert loop.report().rows_trained > rows


async def test_a_follower_whose_broker_is_away_is_asked_again() -> None:
    class Away(ToldAtOnce):
        polls = closes = 0

        async def close(self) -> None:
            self.closes += 1

        async def poll(self, *, wait_seconds: float) -> int:
            assert wait_seconds == 0
            self.polls += 1
            if self.polls == 1:
                raise BrokerUnavailable("Kafka", "away")
            return 0

    seconds = iter(range(10**9, 2 * 10**9, 60))
    follower: list[Away] = []

    def follow(tell: Any) -> Away:
        follower.append(Away(tell, [], []))
        return follower[0]

    report = await trained(
        make_loop(ListedInput(vectors(*ALL), make_log(200)), follow=follow, clock=lambda: float(next(seconds)))
    )
    assert report.accounts["trained"] == 200 and follower[0].polls > 1 and follower[0].closes == 1


async def test_a_run_that_cannot_begin_leaves_nothing_under_way_and_nothing_open() -> None:
    ended: list[str] = []

    def ends(name: str) -> Any:
        async def close() -> None:
            ended.append(name)

        return SimpleNamespace(cancel=lambda: ended.append(name), close=close)

    async def refused() -> None:
        raise Misconfigured("no topic 'behaviours'")

    given = ends("input")
    given.open = refused
    loop = TrainingLoop(
        given, SimpleNamespace(waits=None), TrainReports(interval=IntervalTimer(1, lambda: 0.0)),  # type: ignore[arg-type]
        commits=ends("commits"), states=ends("states"), checkpointer=ends("checkpoints"), follower=ends("follower"),
        clock=lambda: 0.0,
    )  # fmt: skip
    with pytest.raises(Misconfigured):
        await loop.run(asyncio.Event())
    assert ended == ["commits", "states", "checkpoints", "follower", "input"]


async def test_a_log_of_an_encoder_that_is_not_there_names_it() -> None:
    given = ListedInput([], make_log(3))
    with pytest.raises(Exception, match="holds no vector of encoder e: run 'mimstream index'"):
        await trained(make_loop(given))


async def test_a_disk_that_is_full_costs_a_report_and_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    flushed: list[bool] = []

    def full(*_: Any) -> None:
        raise StoreUnavailable("state folder", "no space left")

    scores: Any = SimpleNamespace(flush=lambda: flushed.append(True), add=told.append)
    reports = TrainReports(
        interval=IntervalTimer(5, lambda: 0.0), folder=object(), scores=scores, on_report=told.append,  # type: ignore[arg-type]
        on_scored=lambda rows: told.append("scored"),
    )  # fmt: skip
    assert reports.due
    with monkeypatch.context() as patched, capture_logs() as said:
        patched.setattr(reports_module, "write_report", full)
        await reports.write(TrainReport(accounts=NO_COUNTS))
    assert [line["event"] for line in said] == ["train.not_reported"] and len(told) == 1 and not reports.due
    monkeypatch.setattr(reports_module, "write_report", lambda *_: None)
    await reports.write(TrainReport(accounts=NO_COUNTS))
    assert flushed == [True]
    await reports.add_scores([])
    assert told[2:] == ["scored", []]
