"""The training loop over an input without a broker: nothing is left over, nothing is waited for in vain."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from streams.stores.artifacts.checkpoints import Checkpoint, CheckpointMeta
from streams.training.input import VectorRecord
from tests.factories.training import (
    ALL,
    CONFIG,
    DIM,
    ListedInput,
    ToldAtOnce,
    forgotten,
    make_log,
    make_loop,
    trained,
    until,
    vectors,
)
from trainer.samples.forgotten import ForgottenUsers
from trainer.state import State


async def test_users_who_asked_before_and_meanwhile_are_forgotten_and_may_come_back() -> None:
    log = make_log(700)
    now = [forgotten("u1", until=350), forgotten("u2", until=700, topic_id="of another log")]
    later = [forgotten("u3", until=10_000)]
    loop = make_loop(
        ListedInput(vectors(*ALL), log),
        gone=ForgottenUsers("c", "t"),
        follow_forgotten=lambda tell: ToldAtOnce(tell, now, later),
    )
    standing = await trained(loop)
    of = {user: [n for n, event in enumerate(log) if event and event.user_id == user] for user in ("u1", "u3")}
    takes = [n for n in of["u3"] if n % 5 == 4]
    erased = sum(n < 350 for n in of["u1"]) + len(of["u3"])
    assert standing.accounts["pending"] == 0 and standing.accounts["received"] == 700
    # of u3, what was counted as trained before he asked stays counted; nothing else of him
    assert erased - len(takes) <= standing.accounts["erased"] <= erased
    assert standing.accounts["trained"] == 700 - standing.accounts["erased"]
    state = loop.trainer.snapshot() if loop.trainer else None
    assert state is not None and "u3" not in state.part("join").texts("users")
    assert {"u1", "u2"} <= set(state.part("join").texts("users"))


async def test_a_user_who_asks_meanwhile_is_taken_out_of_what_the_trainer_holds() -> None:
    seconds = itertools.count(10**9)

    def follow(tell: Any) -> ToldAtOnce:
        later = [forgotten("u3", until=10_000)]
        return ToldAtOnce(tell, [], later, when=lambda: loop.standing().accounts["received"] > 0)

    loop = make_loop(
        ListedInput(vectors(*ALL), make_log(700)),
        gone=ForgottenUsers("c", "t"),
        follow_forgotten=follow,
        clock=lambda: float(next(seconds)),
    )
    with capture_logs() as lines:
        standing = await trained(loop)
    (line,) = [line for line in lines if line["event"] == "train.user_forgotten"]
    assert line["events"] > 0 and standing.accounts["erased"] > line["events"]  # held then, and read since
    assert standing.accounts["trained"] + standing.accounts["erased"] == 700
    assert loop.trainer is not None and "u3" not in loop.trainer.snapshot().part("join").texts("users")


@pytest.mark.parametrize("count", [1, 15, 16, 17, 511, 512, 513, 700])
async def test_a_bounded_run_leaves_nothing_pending_however_long_the_log_is(count: int) -> None:
    standing = await trained(make_loop(ListedInput(vectors(*ALL), make_log(count))))
    assert standing.accounts == {
        "received": count,
        "trained": count,
        "late": 0,
        "duplicate": 0,
        "dead_lettered": 0,
        "erased": 0,
        "pending": 0,
    }
    assert standing.offsets["behaviours"] == {0: count}


async def test_broken_events_late_vectors_and_deleted_items_are_accounted_for() -> None:
    log = make_log(300)
    log[10] = log[200] = None
    deleted = [VectorRecord("i4", None)]
    standing = await trained(make_loop(ListedInput(vectors("i0", "i1", "i2", "i4") + deleted, log)))
    assert standing.accounts["trained"] == 298 and standing.accounts["dead_lettered"] == 2
    assert standing.given_up == 1  # i3 never had a vector; i4's tombstone is an answer


async def test_the_figures_do_not_depend_on_the_fetch_size() -> None:
    runs = []
    for size in (1, 50, 10_000):
        standing = await trained(make_loop(ListedInput(vectors(*ALL), make_log(900), size=size)))
        runs.append((standing.rows_sha256, standing.steps, standing.accounts))
    assert runs[0] == runs[1] == runs[2]


async def test_without_any_vector_a_bounded_run_says_what_to_do() -> None:
    with pytest.raises(Misconfigured, match="mimstream index"):
        await trained(make_loop(ListedInput([], make_log(3))))


async def test_a_window_that_cannot_hold_its_events_says_so_instead_of_stopping_still() -> None:
    stuck = CONFIG.model_copy(update={"lateness_seconds": 1e9})
    with pytest.raises(Misconfigured, match="MIM_TRAINER__MAX_PENDING"):
        await trained(make_loop(ListedInput(vectors(*ALL), make_log(3000)), config=stuck))


async def test_reading_stops_while_a_vector_is_waited_for_and_goes_on_when_it_is_there() -> None:
    given = ListedInput(vectors("i0", "i1", "i2", "i4"), make_log(3000))
    given.vectors_are_current = False  # the broker has more of them: nothing is given up
    loop = make_loop(given, bounded=False)
    stop = asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    await until(lambda: loop.standing().waiting_for > 0)
    for _ in range(50):
        await asyncio.sleep(0.01)
    held = loop.standing()
    assert held.accounts["pending"] <= 200 + 512 and held.rows_trained == 0 and given.fetched < 1500
    given.vectors = vectors("i3")
    await until(lambda: loop.standing().accounts["received"] == 3000)
    stop.set()
    await asyncio.wait_for(running, 30)
    assert loop.standing().given_up == 0 and loop.standing().accounts["late"] == 0


async def test_deletes_whose_tombstones_are_gone_are_made_up_for_when_all_vectors_are_read_again() -> None:
    first = make_loop(ListedInput(vectors(*ALL), make_log(300)))
    await trained(first)
    assert first.trainer is not None
    state = State()
    state.put("trainer", first.trainer.snapshot())
    none: dict[str, int] = {}
    state.values["loop"] = {"waits": {"since": none, "given_up": 0}, "last_event_at": None, "metrics": {}}
    state.values["loop"] |= {"scores": None, "begins": {"0": 0}, "gone": {}}
    meta = CheckpointMeta(
        created_at=datetime.fromtimestamp(0, UTC),
        encoder_version="e",
        dim=DIM,
        offsets={},
        cluster_id="c",
        topic_ids={},
        config={},
        code_sha256="",
        rows_trained=1,
        rows_sha256="",
    )
    for anew, left in ((True, ["i0", "i2"]), (False, list(ALL))):
        given = ListedInput(vectors("i0", "i2"), make_log(0))
        loop = make_loop(given, resume=Checkpoint(meta, state), vectors_anew=anew)
        await trained(loop)
        assert loop.trainer is not None and sorted(loop.trainer.catalogue.items_with_vector) == left


async def test_a_clock_that_is_set_back_puts_no_report_off() -> None:
    now = [1e9]
    reports: list[float] = []
    loop = make_loop(
        ListedInput(vectors(*ALL), make_log(20)),
        report_interval_seconds=5,
        clock=lambda: now[0],
        on_report=lambda report: reports.append(report.updated_at),
    )
    await loop._keep_up()
    now[0] += 4
    await loop._keep_up()
    assert reports == [1e9]
    now[0] -= 3_600
    await loop._keep_up()
    assert reports == [1e9, 1e9 + 4 - 3_600]
