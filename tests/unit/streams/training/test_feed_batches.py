"""What the trainer is given next: how much at a time, which silence counts, and whose vector is not waited for."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from streams.training import feed
from streams.training.feed import Feed
from tests.factories.samples import behaviour, small_config
from trainer.samples.partition_merge import Entry
from trainer.samples.searches import searched


class Reads:
    """An input of two partitions."""

    def __init__(self) -> None:
        self.log: list[Entry] = []
        self.asked: list[int] = []
        self.bounded = self.all_handed_out = self.waits_for_silence = False
        self.embeddings_are_current = True
        self.excepted: list[set[int]] = []
        self.silent: list[int] = []

    def add(self, count: int, partition: int = 0) -> None:
        n = len(self.log)
        self.log += [Entry(partition, n + i, float(i), behaviour(f"e{i}", item=f"i{i}")) for i in range(count)]

    def next_behaviours(self, most: int, *, only: Collection[int] | None = None) -> list[Entry]:
        assert only is None
        self.asked.append(most)
        given, self.log = self.log[:most], self.log[most:]
        return given

    def newly_idle(self, *, except_for: Any) -> list[int]:
        self.excepted.append(set(except_for))
        return [number for number in self.silent if number not in except_for]


class Waits:
    """Items that were asked for, and those that are overdue at a time."""

    def __init__(self) -> None:
        self.asked: dict[str, float] = {}

    def needed(self, item_id: str, at: float) -> None:
        self.asked[item_id] = at

    def overdue(self, missing: Any, now: float) -> set[str]:
        return {item for item in missing if now - self.asked.get(item, now) >= 10}


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "_MOST_EVENTS", 8)
        self.reads, self.waits, self.now = Reads(), Waits(), 0.0
        self.held = 0
        self.config = small_config(pending_megabytes=0.5)
        given: Any = self.reads
        waits: Any = self.waits
        self.feed = Feed(given, waits, clock=lambda: self.now)

    def next(self, *missing: str) -> Any:
        intake = SimpleNamespace(pending_bytes=self.held, pending=7, window=SimpleNamespace(slowest=frozenset()))
        catalogue = SimpleNamespace(holds=lambda item_id: False)
        trainer: Any = SimpleNamespace(config=self.config, intake=intake, catalogue=catalogue)
        return self.feed.next(trainer, missing)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_what_has_come_is_given_at_once_and_never_more_than_one_batch(scene: Scene) -> None:
    assert scene.next().empty
    scene.reads.add(3)
    batch = scene.next()
    assert len(batch.entries) == 3 and not batch.empty and not batch.finish
    scene.reads.add(20)
    assert [len(scene.next().entries) for _ in range(4)] == [8, 8, 4, 0]
    assert scene.waits.asked["i2"] == 2.0 and len(scene.waits.asked) == 20


@pytest.mark.parametrize("queries", [False, True])
def test_a_query_is_waited_for_since_it_was_searched_where_rows_see_it(scene: Scene, queries: bool) -> None:
    features = scene.config.features.model_copy(update={"queries": queries})
    scene.config = scene.config.model_copy(update={"features": features})
    lamp = behaviour("e", item="i", query_text="a  lamp")
    scene.reads.log += [Entry(0, 0, 5.0, lamp), Entry(0, 1, 6.0, None), Entry(0, 2, 7.0, behaviour("f", item="j"))]
    scene.next()
    wanted = {str(searched("a lamp", None)): 5.0} if queries else {}
    assert scene.waits.asked == {"i": 5.0, "j": 7.0} | wanted


def test_a_bounded_input_is_cut_into_batches_of_one_size_whatever_the_fetches_were(scene: Scene) -> None:
    scene.reads.bounded = True
    sizes = []
    for fetched in (3, 3, 9, 0, 4):
        scene.reads.add(fetched)
        sizes.append(len(scene.next().entries))
    assert sizes == [0, 0, 8, 0, 8] and scene.reads.asked == [8, 5, 2, 8, 1]
    scene.reads.add(2)
    assert scene.next().entries == []
    scene.reads.all_handed_out = True
    last = scene.next()
    assert len(last.entries) == 5 and not last.finish  # not before they were given
    assert scene.next().finish


def test_a_partition_is_not_idle_while_events_of_it_are_held_back(scene: Scene) -> None:
    scene.reads.bounded, scene.reads.silent = True, [0, 1]
    scene.reads.add(2, partition=1)
    batch = scene.next()
    assert (list(batch.idle), scene.reads.excepted, batch.empty) == ([0], [{1}], False)


def test_an_endless_input_never_finishes(scene: Scene) -> None:
    scene.reads.all_handed_out = True
    assert not scene.next().finish and scene.next().empty


@pytest.mark.parametrize(
    ("bounded", "current", "now", "given_up"),
    [
        (False, True, 9.9, set()),
        (False, True, 10.0, {"i0"}),
        (False, False, 99.0, set()),  # its vector may lie unread
        (True, False, 0.0, {"i0", "unknown"}),  # none will come
    ],
)
def test_a_vector_is_given_up_after_its_time_once_all_vectors_are_read(
    scene: Scene, bounded: bool, current: bool, now: float, given_up: set[str]
) -> None:
    scene.reads.add(1)
    scene.next()
    scene.reads.bounded, scene.reads.embeddings_are_current, scene.now = bounded, current, now
    batch = scene.next("i0", "unknown")
    assert set(batch.timed_out) == given_up and batch.empty == (not given_up)
    assert set(scene.next().timed_out) == set()


@pytest.mark.parametrize(("waits_for", "silence"), [(("i0",), False), ((), True)])
def test_a_full_trainer_is_fed_no_more_while_something_else_can_empty_it(
    scene: Scene, waits_for: tuple[str, ...], silence: bool
) -> None:
    scene.reads.add(20)
    scene.held, scene.reads.waits_for_silence = 499_999, silence
    assert len(scene.next(*waits_for).entries) == 8
    scene.held = 5_000_000
    assert scene.next(*waits_for).entries == [] and len(scene.reads.log) == 12
    scene.held = 0
    assert len(scene.next(*waits_for).entries) == 8


def test_a_full_trainer_that_only_later_events_can_empty_is_told_now_and_then_and_ends_at_twice_its_memory(
    scene: Scene,
) -> None:
    scene.reads.add(40)
    scene.held = 500_000
    with capture_logs() as said:
        for moment in (0, 59, 60):
            scene.now = moment
            assert len(scene.next().entries) == 8
    assert [line["event"] for line in said] == ["train.memory_short"] * 2
    assert (said[0]["held_megabytes"], said[0]["only_read"]) == (0, [])
    scene.held = 999_999
    scene.next()
    scene.held = 1_000_000
    with pytest.raises(Misconfigured, match=r"PENDING_MEGABYTES=0\.5 .*MIM_TRAINER__LATENESS_SECONDS") as caught:
        scene.next()
    assert "DRAW_WINDOW" not in str(caught.value)
    scene.config = small_config(pending_megabytes=0.5, draw_exposures=4, draw_window_seconds=25)
    with pytest.raises(Misconfigured, match=r"each waits 40 s .*MIM_TRAINER__DRAW_WINDOW_SECONDS"):
        scene.next()
