"""A device with a fast clock makes no other event late: none after its own, and none of another partition."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from schemas.behaviours import Behaviour
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.training.input import TrainingInput
from tests.factories.training import ALL, CONFIG, ListedInput, make_log, make_loop, trained, vectors
from trainer.online.config import TrainerConfig
from trainer.provenance.rebuild import Rebuild
from trainer.samples.join_rules import JoinRules
from trainer.samples.partition_merge import Entry, PartitionMerge
from trainer.samples.window import ObserveResult

AHEAD = timedelta(minutes=55)


def fast(event: Behaviour) -> Behaviour:
    return event.model_copy(update={"occurred_at": event.occurred_at + AHEAD})


def stamped(count: int, *, fast_at: int = 10) -> list[tuple[Behaviour, float]]:
    """Events, one a second, each written to the log as it happens; one comes from a device that is fast."""
    log = [(event, event.occurred_at.timestamp() + 0.3) for event in make_log(count) if event is not None]
    log[fast_at] = (fast(log[fast_at][0]), log[fast_at][1])
    return log


class StampedInput(ListedInput):
    """A log whose records say when they were written."""

    def __init__(self, log: list[tuple[Behaviour, float]], **more: Any) -> None:
        super().__init__(vectors(*ALL), [event for event, _ in log], **more)
        self.written = [at for _, at in log]
        add = self.reading.add

        def stamping(partition: int, entries: Any) -> None:
            add(
                partition, [replace(entry, produced_at=0.0, written_at=self.written[entry.offset]) for entry in entries]
            )

        self.reading.add = stamping  # type: ignore[method-assign]


def results(rules: JoinRules, log: list[tuple[Behaviour, float]]) -> Counter[str]:
    window = rules.window()
    return Counter(window.observe(0, n, event, written_at=at).name for n, (event, at) in enumerate(log))


def test_one_fast_clock_makes_no_other_event_late_and_a_late_one_stays_late() -> None:
    rules = JoinRules.of(TrainerConfig(), [0])
    log = stamped(3600)
    assert results(rules, log) == {"ACCEPTED": 3600}
    window = rules.window()
    for n, (event, at) in enumerate(log[:200]):
        window.observe(0, n, event, written_at=at)
    early = log[0][0].model_copy(update={"event_id": "early"})
    assert window.observe(0, 200, early, written_at=log[200][1]) is ObserveResult.LATE


def test_the_fast_event_comes_when_it_says_and_keeps_nothing_back() -> None:
    log = stamped(3600)
    window = JoinRules.of(TrainerConfig(), [0]).window()
    seconds = []
    for n, (event, at) in enumerate(log):
        window.observe(0, n, event, written_at=at)
        seconds += [event.second for second in window.released() for event in second]
    assert seconds == sorted(seconds) and len(seconds) > 3400 and window.buffered < 70


async def test_a_run_learns_what_follows_a_fast_clock_and_its_rows_are_rebuilt() -> None:
    log = stamped(600)
    loop = make_loop(StampedInput(log))
    standing = await trained(loop)
    assert standing.accounts["trained"] == 600 and standing.accounts["late"] == 0
    assert loop.trainer is not None
    segment = loop.trainer.journal.segment()
    rebuild = Rebuild(segment, JoinRules.kept(JoinRules.of(CONFIG, [0]).settings, [0], ()))
    for offset, (event, at) in enumerate(log):
        rebuild.observe(0, offset, event, written_at=at)
        rebuild.advance()
    rebuild.advance(everything=True)
    assert rebuild.verify(segment.root).verified


def test_a_partition_with_a_fast_clock_is_not_left_behind_by_the_others() -> None:
    merge = PartitionMerge([0, 1], room_per_partition=1000)
    for partition in (0, 1):
        log = stamped(100, fast_at=10 if partition else 0)
        merge.add(partition, [Entry(partition, n, 0.0, event, at) for n, (event, at) in enumerate(log)])
    merge.set_exhausted({0: float("inf"), 1: float("inf")})
    taken = Counter(entry.partition for entry in merge.pop(100))
    assert abs(taken[0] - taken[1]) <= 2


def test_the_log_says_when_it_was_written_whatever_clock_the_reader_has() -> None:
    event, at = stamped(1, fast_at=0)[0]
    settings: dict[str, Any] = {"fetch_max_records": 1, "buffered_records": 1, "idle_seconds": 1.0, "bounded": False}
    settings |= {"open_transaction_seconds": 60.0, "all_idle_seconds": 1.0}
    reads = TrainingInput(
        BrokerConfig(), TopicsConfig(), field_map={}, encoder_version=None, clock=lambda: at - 1000, **settings
    )
    key, value = event.user_id.encode(), event.model_dump_json().encode()
    record = SimpleNamespace(partition=0, offset=5, timestamp=round(at * 1000), key=key, value=value, headers=())
    entry = reads._entry(record)
    assert entry.behaviour == event and (entry.written_at, entry.produced_at) == (at, at - 1000)
