"""What `mimstream trainset` reads of the click log, and what it says where that is not the log of the release."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streams.broker.cluster import ClusterTopics
from streams.settings import Settings
from streams.wiring import trainset
from tests.factories.samples import behaviour
from trainer.samples.partition_merge import Entry

SETTINGS = Settings()
LOG = ClusterTopics("c", {"behaviours": "b", "embeddings": "e"}, {"behaviours": [0, 1], "embeddings": [0]})


class Reads:
    """Two partitions, given two events at a time."""

    def __init__(self, log: list[Entry], beginnings: dict[int, int]) -> None:
        self.log, self.beginnings = log, beginnings
        self.given: dict[str, Any] = {}
        self.closed = False

    def __call__(self, *_: Any, **given: Any) -> Reads:
        self.given = given
        return self

    async def open(self) -> None: ...

    async def close(self) -> None:
        self.closed = True

    async def fetch(self, *, embeddings: bool, behaviours: bool, wait_seconds: float) -> None:
        assert not embeddings and behaviours

    def next_behaviours(self, most: int) -> list[Entry]:
        given, self.log = self.log[:2], self.log[2:]
        return given

    @property
    def all_handed_out(self) -> bool:
        return not self.log


class Rebuild:
    """Notes what it is fed; complete after `enough` events."""

    def __init__(self, enough: int) -> None:
        self.fed: list[tuple[Any, ...]] = []
        self.everything = False
        self._enough = enough

    def observe(self, partition: int, offset: int, event: Any, *, written_at: float) -> None:
        self.fed.append((partition, offset, event.event_id, written_at))

    def erased(self, partition: int, offset: int, user_id: str) -> None:
        self.fed.append((partition, offset, user_id))

    def advance(self, *, everything: bool = False) -> None:
        self.everything = everything

    @property
    def complete(self) -> bool:
        return len(self.fed) >= self._enough


def entry(partition: int, offset: int, user: str | None = "u1") -> Entry:
    event = None if user is None else behaviour(f"e{partition}-{offset}", user=user)
    return Entry(partition, offset, 0.0, event, written_at=float(offset))


async def read(
    monkeypatch: pytest.MonkeyPatch, log: list[Entry], *, beginnings: dict[int, int] | None = None, enough: int = 99
) -> tuple[list[str], Reads, Rebuild]:
    reads, rebuild = Reads(log, beginnings or {0: 0, 1: 0}), Rebuild(enough)

    async def users(*_: Any, cluster_id: str, topic_id: str) -> Any:
        assert (cluster_id, topic_id) == ("c", "b")
        return SimpleNamespace(erases=lambda user, partition, offset: user == "gone")

    monkeypatch.setattr(trainset, "read_forgotten_users", users)
    monkeypatch.setattr(trainset, "TrainingInput", reads)
    kept: Any = SimpleNamespace(meta=SimpleNamespace(begins={0: 5, 1: 3}))
    problems = await trainset._read_log(SETTINGS, kept, rebuild, LOG, 7)  # type: ignore[arg-type]
    assert reads.closed
    return problems, reads, rebuild


async def test_the_log_is_read_from_where_training_began_to_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    log = [entry(0, 5), entry(1, 3, "gone"), entry(1, 4, None), entry(0, 6), entry(0, 7)]
    problems, reads, rebuild = await read(monkeypatch, log, enough=3)
    assert problems == [] and len(reads.log) == 1
    assert rebuild.fed == [(0, 5, "e0-5", 5.0), (1, 3, "gone"), (0, 6, "e0-6", 6.0)] and not rebuild.everything
    given = reads.given
    assert given["start_at"] == {"behaviours": {0: 5, 1: 3}} and given["bounded"] and not given["lost_is_fatal"]
    assert (given["fetch_max_records"], given["buffered_records"], given["encoder_version"]) == (7, 70, None)


async def test_a_log_that_ends_before_the_last_row_is_taken_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    problems, _, rebuild = await read(monkeypatch, [entry(0, 5)])
    assert problems == [] and rebuild.everything  # what is lacking is told by the rows themselves


async def test_events_that_retention_deleted_are_told_by_partition_if_rows_are_lacking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems, _, _ = await read(monkeypatch, [entry(0, 9)], beginnings={0: 9, 1: 3})
    (told,) = problems
    assert "offsets 5 to 9 of partition 0 any more" in told and "partition 1" not in told
    problems, _, _ = await read(monkeypatch, [entry(0, 9)], beginnings={0: 9, 1: 3}, enough=1)
    assert problems == []


def test_a_release_of_other_topics_is_told_with_both_clusters() -> None:
    ours: Any = SimpleNamespace(cluster_id="c", topic_ids=LOG.topic_ids)
    assert trainset._other_log(ours, LOG) == []
    theirs: Any = SimpleNamespace(cluster_id="other", topic_ids=LOG.topic_ids)
    (told,) = trainset._other_log(theirs, LOG)
    assert "in cluster other" in told and "in cluster c," in told and "MIM_TOPICS__PREFIX" in told
