"""The training loop over an input without a broker: nothing is left over, nothing is waited for in vain."""

from __future__ import annotations

import asyncio
import itertools
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from schemas.items import ItemEmbedding, SourceOffset
from streams.stores.artifacts.checkpoints import Snapshot, SnapshotMeta
from streams.training.config import TrainConsumerConfig
from streams.training.input import VectorRecord
from streams.training.loop import TrainOnBehaviours
from streams.training.reports import TrainReport
from trainer.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.samples.forgotten import ForgottenUsers
from trainer.samples.partition_merge import AlignedReading, Entry
from trainer.state import State

DIM = 8
CONFIG = TrainerConfig(batch_rows=16, space_negatives=4, time_negatives=4, max_pending=200)


def make_embedding(item_id: str) -> ItemEmbedding:
    vector = np.random.default_rng(sum(item_id.encode())).normal(size=DIM)
    return ItemEmbedding(
        item_id=item_id,
        encoder_version="e",
        vector=b64encode((vector / np.linalg.norm(vector)).astype("<f4").tobytes()),
        dim=DIM,
        content_hash=item_id,
        published_at=datetime.fromtimestamp(0, UTC),
        source=SourceOffset(partition=0, offset=0),
    )


def make_log(count: int, *, items: int = 5, first: int = 0) -> list[Behaviour | None]:
    return [
        Behaviour(
            event_id=f"e{number}",
            kind=BehaviourKind.CLICK if number % 5 == 4 else BehaviourKind.EXPOSURE,
            user_id=f"u{number % 7}",
            item_id=f"i{number % items}",
            occurred_at=datetime.fromtimestamp(1_000_000 + number, UTC),
        )
        for number in range(first, first + count)
    ]


class ListedInput:
    """What `TrainingInput` gives, from lists; one partition, a few records a fetch."""

    def __init__(self, vectors: Sequence[VectorRecord], log: Sequence[Behaviour | None], *, size: int = 7) -> None:
        self.vectors, self.log, self.size = list(vectors), list(log), size
        self.reading = AlignedReading([0], room_per_partition=50)
        self.beginnings, self.embedding_offsets, self.partitions = {0: 0}, {0: 0}, [0]
        self.starts = {0: 0}
        self.encoder_version = "e"
        self.broken_vectors = self.other_encoders = 0
        self.fetched = 0
        self.vectors_told = False
        self.vectors_are_current = True
        self.waits_for_silence = False

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def read_all_vectors_of_the_start(self) -> bool:
        return self.vectors_told or not self.vectors

    async def fetch(self, *, embeddings: bool, behaviours: bool, wait_seconds: float) -> None:
        await asyncio.sleep(0)
        if behaviours and self.reading.with_room():
            new = self.log[self.fetched : self.fetched + self.size]
            self.reading.offer(0, [Entry(0, self.fetched + i, 0.0, event) for i, event in enumerate(new)])
            self.fetched += len(new)
            self.reading.exhausted({0: math.inf} if self.fetched == len(self.log) else {})

    @property
    def has_vectors(self) -> bool:
        return bool(self.vectors)

    def take_vectors(self) -> list[VectorRecord]:
        taken, self.vectors, self.vectors_told = self.vectors, [], True
        return taken

    def take_behaviours(self, most: int) -> list[Entry]:
        return self.reading.take(most)

    def newly_idle(self, *, except_for: Iterable[int] = ()) -> list[int]:
        return []

    @property
    def all_handed_out(self) -> bool:
        return bool(self.reading.empty_and_exhausted())


class ToldAtOnce:
    """A follower of `forgotten` that knows its users from the start, and of others when it is asked again, `when`."""

    def __init__(
        self,
        tell: Any,
        now: list[ForgottenUser],
        later: list[ForgottenUser],
        *,
        when: Callable[[], bool] = lambda: True,
    ) -> None:
        self.tell, self.now, self.later, self.when = tell, now, later, when

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def catch_up(self) -> None:
        await self.tell(self.now, "source", len(self.now))

    async def poll(self, *, wait_seconds: float) -> int:
        if not self.when():
            return 0
        later, self.later = self.later, []
        await self.tell(later, "source", len(self.now) + len(later))
        return len(later)


def forgotten(user_id: str, *, until: int, topic_id: str = "t") -> ForgottenUser:
    moment = datetime.fromtimestamp(0, UTC)
    return ForgottenUser(user_id=user_id, forgotten_at=moment, cluster_id="c", topic_id=topic_id, ends={0: until})


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


def make_loop(
    given: ListedInput,
    *,
    bounded: bool = True,
    config: TrainerConfig = CONFIG,
    clock: Callable[[], float] = lambda: 1e9,
    report_interval_seconds: float = 1.0,
    **collaborators: Any,
) -> TrainOnBehaviours:
    return TrainOnBehaviours(
        TrainConsumerConfig(report_interval_seconds=report_interval_seconds),
        given,  # type: ignore[arg-type]
        behaviours_topic="behaviours",
        make_trainer=lambda version, dim, parts: OnlineTrainer(
            config, encoder_version=version, dim=dim, partitions=parts
        ),
        clock=clock,
        bounded=bounded,
        **collaborators,
    )


def vectors(*item_ids: str) -> list[VectorRecord]:
    return [VectorRecord(item_id, make_embedding(item_id)) for item_id in item_ids]


ALL = ("i0", "i1", "i2", "i3", "i4")


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


async def trained(loop: TrainOnBehaviours) -> TrainReport:
    await asyncio.wait_for(loop.run(asyncio.Event()), 60)
    return loop.standing()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


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
    meta = SnapshotMeta(
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
        loop = make_loop(given, resume=Snapshot(meta, state), vectors_anew=anew)
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
