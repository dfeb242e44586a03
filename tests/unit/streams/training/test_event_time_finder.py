"""Offsets by event time, found through an index that is kept, against a plain search of the log."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiokafka import TopicPartition

from schemas.errors import StoreUnavailable
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TopicsConfig
from streams.training import event_times
from streams.training.event_times import EventTimeFinder
from tests.factories.fake_consumer import IN_TIME_MS, FakeRecord
from tests.factories.memory_log import MemoryLog
from tests.factories.samples import DAY0, behaviour


class Log(MemoryLog):
    """Two partitions of `behaviours`."""

    def __init__(self, *partitions: list[FakeRecord]) -> None:
        super().__init__(behaviours=partitions)

    def reached(self, number: int, second: float) -> int:
        """The first event that is there and reaches a second, one after another."""
        for record in self.topics["behaviours"][number]:
            if TIMES.get((number, record.offset), -1) >= second:
                return record.offset
        return self.topics["behaviours"][number][-1].offset + 1

    def read_of(self, number: int) -> list[int]:
        return [offset for _, partition, offset in self.passed if partition == number]


TIMES: dict[tuple[int, int], float] = {}


def event(partition: int, offset: int, second: float | None) -> FakeRecord:
    """An event of a second of the day; None makes a record that cannot be read."""
    if second is None:
        return FakeRecord(partition, offset, b"u1", b"{")
    TIMES[partition, offset] = second
    return FakeRecord(partition, offset, b"u1", behaviour("e", second=second).model_dump_json().encode(), IN_TIME_MS)


def finder(file: Path, topic_id: str = "b") -> EventTimeFinder:
    found = ClusterTopics("c", {"behaviours": topic_id}, {"behaviours": [0, 1]})
    return EventTimeFinder(BrokerConfig(), TopicsConfig(), field_map={}, log_now=found, file=file)


async def ask(log: Log, file: Path, *seconds: float) -> list[dict[int, int]]:
    return await finder(file).reached(*(datetime.fromtimestamp(DAY0 + second, UTC) for second in seconds))


@pytest.fixture(autouse=True)
def small_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_times, "_STRIDE", 4)
    TIMES.clear()


@pytest.mark.parametrize("seed", range(8))
async def test_any_moment_is_found_at_the_first_event_that_reaches_it_while_the_log_grows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    log, offsets, file = Log([], []), [0, 0], tmp_path / "deep" / "index.json"
    monkeypatch.setattr(event_times, "LogReader", log)
    for grown in range(4):
        for number in (0, 1):
            for _ in range(rng.randrange(1, 15)):
                at = None if rng.random() < 0.1 else 20 * grown + rng.randrange(30)
                log.topics["behaviours"][number].append(event(number, offsets[number], at))
                offsets[number] += rng.choice([1, 1, 1, 2])  # markers of transactions have offsets too
        moments = [float(rng.randrange(-5, 120)) for _ in range(5)]
        expected = [{number: log.reached(number, second) for number in (0, 1)} for second in moments]
        assert await ask(log, file, *moments) == expected


async def test_what_is_indexed_is_not_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = Log([event(0, n, n) for n in range(41)], [event(1, 0, 3)])
    monkeypatch.setattr(event_times, "LogReader", log)
    assert await ask(log, tmp_path / "index.json", 22) == [{0: 22, 1: 1}]
    assert log.read_of(0)[:40] == list(range(40))
    log.passed.clear()
    assert await ask(log, tmp_path / "index.json", 22.5, 39, 99) == [{0: 23, 1: 1}, {0: 39, 1: 1}, {0: 41, 1: 1}]
    assert set(log.read_of(0)) == {20, 21, 22, 23, 36, 37, 38, 39, 40}


async def test_events_that_retention_deleted_are_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = Log([event(0, n, n) for n in range(41)], [event(1, 0, 3)])
    monkeypatch.setattr(event_times, "LogReader", log)
    await ask(log, tmp_path / "index.json", 0)
    log.first[TopicPartition("mim.behaviours", 0)] = 22
    assert await ask(log, tmp_path / "index.json", 3, 21, 22, 30) == [{0: n, 1: m} for n, m in _AFTER_RETENTION]
    (tmp_path / "index.json").unlink()
    assert await ask(log, tmp_path / "index.json", 3, 21, 22, 30) == [{0: n, 1: m} for n, m in _AFTER_RETENTION]


_AFTER_RETENTION = [(22, 0), (22, 1), (22, 1), (30, 1)]


async def test_an_index_of_another_topic_is_not_used_and_one_that_cannot_be_kept_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "index.json"
    log = Log([event(0, n, n) for n in range(9)], [event(1, 0, 3)])
    monkeypatch.setattr(event_times, "LogReader", log)
    await ask(log, file, 5)
    log.passed.clear()
    await finder(file, "created again").reached(datetime.fromtimestamp(DAY0, UTC))
    assert len(log.passed) > 8 and list(tmp_path.iterdir()) == [file]
    with pytest.raises(StoreUnavailable, match=r"index\.json"):
        await ask(log, file / "index.json", 5)
