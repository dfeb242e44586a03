"""States of items for servers: when they are written, by whom, and what a broker that is away costs."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Fenced
from schemas.item_states import ItemState, parse_state_key
from schemas.skew import SkewRecord
from streams.training import skew_watch
from streams.training.reports import SkewReport
from tests.factories.state_publishing import CONFIG, Scene


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


async def test_the_error_names_five_features_that_differ_most_and_a_row_that_cannot_be_compared_costs_no_other() -> (
    None
):
    scene = Scene()
    await scene.publisher.open()
    scene.take(5)
    await scene.after(0)
    served = scene.served("i1", wrong_by=np.arange(1, 1 + len(CONFIG.names), dtype=np.float32))
    scene.skew.hear(served.replace(b'"i1"', b'"nobody"'))
    scene.skew.hear(served)
    scene.take(30)
    with capture_logs() as logs:
        await scene.after(30)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["train.skew_unreadable"]
    (said,) = (line for line in logs if line["log_level"] == "error")
    assert scene.reports == [SkewReport(1, 1)] and list(said["largest"]) == [*CONFIG.names[:-6:-1]]


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
