"""The training loop over an input without a broker: nothing is left over, nothing is waited for in vain."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from streams.stores.artifacts.checkpoints import Checkpoint
from streams.training.reports import NO_COUNTS
from streams.training.vector_records import EmbeddingRecord
from tests.factories.checkpoints import make_meta
from tests.factories.samples import DIM
from tests.factories.training import (
    ALL,
    CONFIG,
    ListedInput,
    ToldAtOnce,
    forgotten,
    make_log,
    make_loop,
    make_thread,
    trained,
    vectors,
)
from tests.factories.waiting import until
from trainer.samples.forgotten import ForgottenUsers


async def test_users_who_asked_before_and_meanwhile_are_forgotten_and_may_come_back() -> None:
    log = make_log(700)
    now = [forgotten("u1", until=350), forgotten("u2", until=700, topic_id="of another log")]
    later = [forgotten("u3", until=10_000)]
    given = ListedInput(vectors(*ALL), log)
    thread = make_thread(given, forgotten=ForgottenUsers("c", "t"))
    loop = make_loop(given, thread, follow=lambda tell: ToldAtOnce(tell, now, later))
    report = await trained(loop)
    of = {user: [n for n, event in enumerate(log) if event and event.user_id == user] for user in ("u1", "u3")}
    takes = [n for n in of["u3"] if n % 5 == 4]
    erased = sum(n < 350 for n in of["u1"]) + len(of["u3"])
    assert report.accounts["pending"] == 0 and report.accounts["received"] == 700
    # of u3, what was counted as trained before the request stays counted; nothing else of theirs
    assert erased - len(takes) <= report.accounts["erased"] <= erased
    assert report.accounts["trained"] == 700 - report.accounts["erased"]
    state = loop.trainer.snapshot() if loop.trainer else None
    assert state is not None and "u3" not in state.part("join").texts("users")
    assert {"u1", "u2"} <= set(state.part("join").texts("users"))


async def test_a_user_who_asks_meanwhile_is_taken_out_of_what_the_trainer_holds() -> None:
    seconds = itertools.count(10**9)

    def follow(tell: Any) -> ToldAtOnce:
        later = [forgotten("u3", until=10_000)]
        return ToldAtOnce(tell, [], later, when=lambda: loop.report().accounts["received"] > 0)

    given = ListedInput(vectors(*ALL), make_log(700))
    thread = make_thread(given, forgotten=ForgottenUsers("c", "t"))
    loop = make_loop(given, thread, follow=follow, clock=lambda: float(next(seconds)))
    with capture_logs() as lines:
        report = await trained(loop)
    (line,) = [line for line in lines if line["event"] == "train.user_forgotten"]
    assert line["events"] > 0 and report.accounts["erased"] > line["events"]  # held then, and read since
    assert report.accounts["trained"] + report.accounts["erased"] == 700
    assert loop.trainer is not None and "u3" not in loop.trainer.snapshot().part("join").texts("users")


@pytest.mark.parametrize("count", [1, 15, 16, 17, 511, 512, 513, 700])
async def test_a_bounded_run_leaves_nothing_pending_however_long_the_log_is(count: int) -> None:
    report = await trained(make_loop(ListedInput(vectors(*ALL), make_log(count))))
    assert report.accounts == {**NO_COUNTS, "received": count, "trained": count}
    assert report.offsets["behaviours"] == {0: count}


async def test_broken_events_late_vectors_and_deleted_items_are_accounted_for() -> None:
    log = make_log(300)
    log[10] = log[200] = None
    deleted = [EmbeddingRecord("i4", None)]
    report = await trained(make_loop(ListedInput(vectors("i0", "i1", "i2", "i4") + deleted, log)))
    assert report.accounts["trained"] == 298 and report.accounts["dead_lettered"] == 2
    assert report.given_up == 1  # i3 never had a vector; i4's tombstone is an answer


async def test_the_figures_do_not_depend_on_the_fetch_size() -> None:
    runs = []
    for size in (1, 50, 10_000):
        report = await trained(make_loop(ListedInput(vectors(*ALL), make_log(900), size=size)))
        runs.append((report.rows_sha256, report.steps, report.accounts))
    assert runs[0] == runs[1] == runs[2]


async def test_without_any_vector_a_bounded_run_says_what_to_do() -> None:
    with pytest.raises(Misconfigured, match="mimstream index"):
        await trained(make_loop(ListedInput([], make_log(3))))


async def test_a_window_that_cannot_hold_its_events_says_so_instead_of_stopping_still() -> None:
    stuck = CONFIG.model_copy(update={"lateness_seconds": 1e9})
    with pytest.raises(
        Misconfigured, match=r"each waits 1000000060 s of event time .*PENDING_MEGABYTES=0\.34 holds, even twice"
    ):
        await trained(make_loop(ListedInput(vectors(*ALL), make_log(3000)), config=stuck))


async def test_reading_stops_while_a_vector_is_waited_for_and_goes_on_when_it_is_there() -> None:
    given = ListedInput(vectors("i0", "i1", "i2", "i4"), make_log(3000), bounded=False)
    given.embeddings_are_current = False  # the broker has more of them: nothing is given up
    loop = make_loop(given)
    stop = asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    await until(lambda: loop.report().waiting_for > 0)
    for _ in range(50):
        await asyncio.sleep(0.01)
    held = loop.report()
    assert held.accounts["pending"] <= 200 + 512 and held.rows_trained == 0 and given.fetched < 1500
    given.vectors = vectors("i3")
    await until(lambda: loop.report().accounts["received"] == 3000)
    stop.set()
    await asyncio.wait_for(running, 30)
    assert loop.report().given_up == 0 and loop.report().accounts["late"] == 0


async def test_deletes_whose_tombstones_are_gone_are_made_up_for_when_all_vectors_are_read_again() -> None:
    first = ListedInput(vectors(*ALL), make_log(300))
    thread = make_thread(first)
    await trained(make_loop(first, thread))
    state = thread.snapshot()
    for anew, left in ((True, ["i0", "i2"]), (False, list(ALL))):
        given = ListedInput(vectors("i0", "i2"), make_log(0))
        loop = make_loop(given, make_thread(given, reread_embeddings=anew))
        await trained(loop, Checkpoint(make_meta(1, dim=DIM), state))
        assert loop.trainer is not None and sorted(loop.trainer.catalogue.items_with_vector) == left
