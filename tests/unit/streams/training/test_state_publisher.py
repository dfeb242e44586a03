"""States of items for servers: when they are written, by whom, and what a broker that is away costs."""

from __future__ import annotations

import asyncio
import base64
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Fenced
from schemas.item_states import ItemState, StateHead, parse_state_key
from schemas.skew import ServedRows, SkewRecord
from streams.training import skew_watch
from streams.training.config import TrainConsumerConfig
from streams.training.reports import SkewReport
from streams.training.skew_watch import SkewWatch
from streams.training.state_publisher import StatePublisher
from tests.factories.feature_world import Take, World, columns_of
from trainer.features.config import FeatureConfig
from trainer.features.skew import recomputed
from trainer.features.state import FeatureState
from trainer.features.state_records import StateCopies, StateWriter
from trainer.features.states import ItemStates

CONFIG = FeatureConfig(max_items=64, partners=8)
ITEMS = 40
SETTINGS = {"states_every_takes": 20, "states_every_seconds": 10}


class Leads:
    """Transactions that wait for `gate` and may fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.topic: list[tuple[bytes, bytes | None]] = []
        self.sizes: list[int] = []
        self.outcomes: list[bytes] = []

    async def transact(self, records: Any) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.outcomes += [value for topic, _, value in records if topic == "mim.skew"]
        states = [(key, value) for topic, key, value in records if topic == "mim.item-states"]
        assert len(states) == len(records) or self.outcomes
        self.sizes.append(len(records))
        self.topic += states


class Silent:
    """A topic on which no server logs anything."""

    async def open(self, *, since: datetime) -> None: ...

    async def poll(self, *, wait_seconds: float) -> None: ...

    async def close(self) -> None: ...


class Scene:
    def __init__(self, topic: list[tuple[bytes, bytes | None]] | None = None, *, most: int = 100) -> None:
        self.leads, self.now, self.topic_id = Leads(), 100.0, "t1"
        self.state = FeatureState(CONFIG, World(CONFIG, ITEMS))
        self.thread = SimpleNamespace(trainer=SimpleNamespace(moment=self.state, held_states=self.held_states))
        self.takes = 0

        async def read(writer: StateWriter) -> None:
            for record in topic or []:
                writer.heard(*record)

        self.reports: list[SkewReport] = []
        self.skew = SkewWatch(
            CONFIG,
            every_seconds=30,
            limit=0.01,
            topic="mim.skew",
            clock=lambda: self.now,
            on_report=self.reports.append,
            follow=lambda handle: Silent(),  # type: ignore[return-value,arg-type]
        )
        self.publisher = StatePublisher(
            self.leads,  # type: ignore[arg-type]
            self.thread,  # type: ignore[arg-type]
            StateWriter(CONFIG, log="log"),
            TrainConsumerConfig.model_validate(SETTINGS | {"states_per_write": most}),
            skew=self.skew,
            read=read,
            read_id=lambda: self.topic_id,
            topic="mim.item-states",
            clock=lambda: self.now,
        )

    def held_states(self, item_ids: list[str]) -> ItemStates:
        world = World(CONFIG, ITEMS)
        numbers = np.array([world.names.index(name) for name in ["", *item_ids]])
        return self.state.held_states(world.hashes(numbers), world.facts(numbers))

    @property
    def head(self) -> StateHead:
        """Of the newest write."""
        head = ItemState.model_validate_json(self.leads.topic[-1][1] or b"").head
        assert head is not None
        return head

    def served(self, item: str, *, wrong_by: float = 0.0, before: int | None = None) -> bytes:
        """A row that a server scored from the newest write, with all features off by so much."""
        row = ServedRows(
            release_id="r1",
            number=self.head.number,
            before=self.head.before,
            now=1_000,
            targets=[item],
            values=base64.b64encode(bytes(4 * len(CONFIG.names))),
            probabilities=[0.5],
        )
        values = recomputed(CONFIG, row, self.held_states) + np.float32(wrong_by)
        row = row.model_copy(update={"values": values.astype("<f4").tobytes(), "before": before or self.head.before})
        return SkewRecord(features=CONFIG.version, served=row).model_dump_json().encode()

    def take(self, count: int) -> None:
        """So many more takes, one a second, each of another item in turn."""
        at = range(self.takes, self.takes + count)
        self.state.add(columns_of([Take(1 + n, 1 + n % ITEMS, n, n + 1) for n in at]), before=self.takes + count)
        self.takes += count

    async def after(self, seconds: float) -> int:
        """How many writes were made by then."""
        self.now += seconds
        for _ in range(2):  # one begins it, the next one notes that it came to its end
            await self.publisher.publish_if_due()
            for _ in range(3):
                await asyncio.sleep(0)
        return len(self.leads.sizes)

    @property
    def lag(self) -> int:
        """Takes that a server does not know of."""
        copies = StateCopies(CONFIG)
        for record in self.leads.topic:
            copies.apply(*record)
        return self.state.shared.takes - copies.states(self.state._items.hashes(ITEM), FACTS).shared.takes


ITEM = np.array([0])
FACTS = World(CONFIG, 1).facts(ITEM)


async def test_states_are_written_after_so_many_takes_and_after_so_many_seconds_where_fewer_come() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    assert await scene.after(0) == 1 and scene.lag == 0, "the first at once"
    scene.take(5)
    assert await scene.after(9.9) == 1 and scene.lag == 5
    assert await scene.after(0.1) == 2 and scene.lag == 0
    assert await scene.after(1_000) == 2, "nothing changed"
    scene.take(8)
    assert await scene.after(0) == 2
    scene.take(12)
    assert await scene.after(1) == 3, "twenty takes"
    scene.take(3)
    assert await scene.after(1) == 3 and scene.lag == 3


async def test_writes_of_many_takes_stand_a_second_apart_and_one_is_bounded() -> None:
    scene = Scene(most=8)
    await scene.publisher.open()
    scene.take(30)
    writes = [await scene.after(0.5) for _ in range(10)]
    assert scene.leads.sizes == [9, 9, 9, 7] and writes[0] == 1 and writes[1] == 1
    heads = [ItemState.model_validate_json(value).head for key, value in scene.leads.topic if value and b"head" in key]
    assert [(head.number, head.left) for head in heads if head] == [(1, 22), (2, 14), (3, 6), (4, 0)]


async def test_servers_that_lag_since_more_changes_than_is_written_are_told_of_once_a_minute() -> None:
    scene = Scene(most=1)
    await scene.publisher.open()
    scene.take(36)
    with capture_logs() as logs:
        for _ in range(4):
            await scene.after(1)
        assert "train.states_left" not in {line["event"] for line in logs}
        for _ in range(26):
            await scene.after(5)
    told = [line["items"] for line in logs if line["event"] == "train.states_left"]
    assert len(told) == 2 and told[0] > told[1] > 0


async def test_training_does_not_wait_for_a_write_and_another_does_not_begin_meanwhile() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.leads.gate.clear()
    scene.take(5)
    assert await scene.after(0) == 0
    scene.take(30)
    assert await scene.after(100) == 0
    scene.leads.gate.set()
    assert await scene.after(0) == 2, "takes that came while it was under way count for the next"
    assert scene.lag == 0 and sum(scene.leads.sizes) == 30 + 5 + len(scene.leads.sizes)


async def test_what_a_broker_that_was_away_did_not_take_is_written_later() -> None:
    scene = Scene()
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    scene.take(5)
    assert await scene.after(0) == 0
    await scene.publisher.publish_rest(asyncio.Event())
    scene.leads.failure = None
    assert await scene.after(1) == 1 and scene.lag == 0


async def test_a_trainer_that_another_has_replaced_ends() -> None:
    scene = Scene()
    scene.leads.failure = Fenced("another leads")
    scene.take(5)
    with pytest.raises(Fenced):
        await scene.after(0)


async def test_a_trainer_that_is_behind_the_topic_writes_when_it_has_caught_up() -> None:
    former = Scene()
    former.take(60)
    await former.publisher.publish_rest(asyncio.Event())
    scene = Scene(former.leads.topic)
    await scene.publisher.open()
    scene.take(50)
    assert await scene.after(0) == 0 and await scene.after(100) == 0
    await scene.publisher.publish_rest(asyncio.Event())
    assert scene.leads.sizes == []
    scene.take(11)
    assert await scene.after(100) == 1
    items = [parse_state_key(key)[1] for key, _ in scene.leads.topic]
    assert len(items) == 2, "what is as the topic holds it is not written again"


async def test_a_topic_that_was_deleted_and_created_again_gets_all_states_anew() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(30)
    assert await scene.after(0) == 1
    scene.topic_id = "t2"
    scene.leads.topic.clear()
    scene.take(1)
    await scene.after(60)  # it is asked for
    if (looking := scene.publisher._looking) is not None:
        await looking
    await scene.after(10)
    assert len({key for key, _ in scene.leads.topic}) == 31 + 1
    assert scene.head.number >= 2, "a server that read the former topic knows a later one"


async def test_a_run_that_ends_writes_all_that_is_left_and_a_process_that_is_to_stop_does_not_wait_for_that() -> None:
    scene = Scene(most=4)
    scene.take(30)
    stop = asyncio.Event()
    stop.set()
    await scene.publisher.publish_rest(stop)
    assert scene.leads.sizes == [5]
    await scene.publisher.publish_rest(asyncio.Event())
    assert sum(scene.leads.sizes) == 30 + len(scene.leads.sizes) and scene.lag == 0


async def test_without_a_trainer_there_is_nothing_to_write() -> None:
    scene = Scene()
    scene.thread.trainer = None  # type: ignore[assignment]
    assert await scene.after(100) == 0
    await scene.publisher.publish_rest(asyncio.Event())
    await scene.publisher.close()


async def test_now_and_then_a_state_is_kept_and_rows_of_servers_are_compared_before_the_next_one_is() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    assert await scene.after(0) == 1 and scene.head.held
    equal, wrong = scene.served("i1"), scene.served("i2", wrong_by=0.01)
    scene.take(30)
    assert await scene.after(10) == 2 and not scene.head.held, "the state that is kept stays for half a minute"
    scene.skew.hear(equal)
    scene.skew.hear(scene.served("i3"))  # of another state than the one that is kept
    scene.skew.hear(wrong)
    scene.skew.hear(b"{")
    scene.take(30)
    assert await scene.after(20) == 3 and scene.head.held and scene.head.number == 3
    (value,) = scene.leads.outcomes
    outcome = SkewRecord.model_validate_json(value).outcome
    assert outcome is not None and (outcome.number, outcome.rows, outcome.differing) == (1, 2, 1)
    assert set(outcome.largest) == set(CONFIG.names) and scene.reports == [SkewReport(2, 1)]


async def test_rows_that_come_while_the_next_state_is_being_written_are_compared_with_none() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    assert await scene.after(0) == 1 and scene.head.held
    late = scene.served("i1")
    scene.take(30)
    scene.leads.gate.clear()
    assert await scene.after(30) == 1, "compared, and under way"
    scene.skew.hear(late)
    scene.leads.gate.set()
    assert await scene.after(0) == 2 and scene.head.held
    scene.take(30)
    assert await scene.after(30) == 3 and scene.head.held
    assert scene.leads.outcomes == [] and scene.reports == []


async def test_rows_are_not_compared_with_a_state_that_was_kept_for_a_write_that_failed() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    assert await scene.after(0) == 1 and scene.head.held
    late = scene.served("i1")
    scene.take(30)
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    assert await scene.after(30) == 1
    scene.skew.hear(late)
    scene.leads.failure = None
    assert await scene.after(30) == 2 and scene.leads.outcomes == [] and scene.reports == []


async def test_of_a_state_a_bounded_number_of_requests_is_compared_and_none_of_another_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(skew_watch, "_MOST_REQUESTS", 3)
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    scene.skew.hear(scene.served("i1", before=scene.head.before + 1, wrong_by=1))
    for _ in range(5):
        scene.skew.hear(scene.served("i1"))
    scene.take(30)
    await scene.after(30)
    assert scene.reports == [SkewReport(3, 0)]


@pytest.mark.parametrize(
    ("wrong", "limit", "is_told"), [(1, 0.01, False), (2, 0.01, True), (75, 0.5, False), (76, 0.5, True)]
)
async def test_a_share_of_rows_that_differ_is_told_as_an_error_above_its_limit(
    wrong: int, limit: float, is_told: bool
) -> None:
    scene = Scene()
    scene.skew._limit = limit
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    equal, different = scene.served("i1"), scene.served("i2", wrong_by=0.01)
    for row in [equal] * (150 - wrong) + [different] * wrong:
        scene.skew.hear(row)
    scene.take(30)
    with capture_logs() as logs:
        await scene.after(30)
    assert scene.reports == [SkewReport(150, wrong)]
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["train.skew"] * is_told


async def test_an_outcome_is_written_although_nothing_else_is_due_and_again_after_a_broker_was_away() -> None:
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    scene.skew.hear(scene.served("i1"))
    scene.leads.failure = BrokerUnavailable("Kafka", "away")
    assert await scene.after(30) == 1 and not scene.leads.outcomes
    scene.leads.failure = None
    await scene.after(30)
    assert len(scene.leads.outcomes) == 1
    scene.take(30)
    await scene.after(10)
    assert scene.lag == 0 and len(scene.leads.outcomes) == 1, "once"


async def test_no_state_is_kept_of_a_write_that_leaves_items_over() -> None:
    scene = Scene(most=2)
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    assert scene.head.left == 3 and not scene.head.held and scene.state.held_before is None
    while scene.head.left:
        await scene.after(1)
    assert scene.head.held
