"""One call of the trainer in its thread: what it is fed, in which order, and after which batch it stops."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from streams.training.feed import FeedBatch
from streams.training.trainer_thread import TrainerThread, in_thread
from streams.training.vector_records import EmbeddingRecord
from tests.factories.samples import behaviour, embedding, unit_vector
from trainer.samples.partition_merge import Entry
from trainer.samples.searches import query_item

NOTHING = FeedBatch([], [], frozenset(), False)


def configured(*, queries: bool = False, kinds: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(features=SimpleNamespace(queries=queries), model=SimpleNamespace(kinds=kinds))


class Parts:
    """A trainer of `batches`, its input and its waits; `calls` are what they were asked for, in order."""

    def __init__(self, *, batches: int = 0) -> None:
        self.calls: list[Any] = []
        self.batches, self.due_after, self.refused = batches, 10**9, set[str]()
        self.stepped = self.searched = 0
        self.fetched: list[EmbeddingRecord] = []
        self.has_embeddings = False
        self.partitions = [0, 1]
        self.at_last_rows = False
        self.shadow: Any = None
        self.intake = self.window = self.progress = self
        self.kinds: dict[str, int] = {}
        self.config = configured()
        self.forgotten: Any = SimpleNamespace(
            erases=lambda user, partition, offset: user == "gone", add=lambda user: user.user_id == "u1"
        )
        given: Any = self
        self.thread = TrainerThread(given, self.made, waits=given, forgotten=self.forgotten)

    def made(self, version: str, dim: int, partitions: Any) -> Any:
        self.calls.append(("made", version, dim, partitions))
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("observe", "observe_broken", "observe_erased", "idle", "finish", "timed_out", "resolved",
                    "delete_item"):  # fmt: skip
            return lambda *given, **_: self.calls.append((name, *given))
        raise AttributeError(name)

    def next_embeddings(self) -> list[EmbeddingRecord]:
        fetched, self.fetched = self.fetched, []
        return fetched

    def put_embedding(self, message: Any) -> None:
        if message.item_id in self.refused:
            raise ValueError("another width")
        self.calls.append(("put", message.item_id))

    def advance(self, *, timed_out: Any = ()) -> frozenset[str]:
        self.calls.append(("advance", *sorted(timed_out)))
        return frozenset({f"after {self.stepped}"})

    trees = None

    def step(self) -> Any:
        if self.stepped == self.batches:
            return None
        self.stepped += 1
        if self.shadow is not None:
            self.shadow.complete = self.stepped >= 2
        return SimpleNamespace(losses={"loss": float(self.stepped)}, last_event_at=100 + self.stepped)

    def release_due(self) -> bool:
        return self.stepped >= self.due_after

    def drain_scores(self) -> list[str]:
        return ["rows"] * self.stepped

    def run(self, batch: FeedBatch = NOTHING, *, releases: bool = True, stopped: bool = False) -> Any:
        self.thread.trainer = self  # type: ignore[assignment]
        stop = asyncio.Event()
        if stopped:
            stop.set()
        return self.thread.run_once(batch, stop=stop, releases=releases)


def test_every_event_is_counted_once_as_what_it_is_before_silence_and_the_end() -> None:
    parts = Parts()
    good, gone = behaviour("e1", user="u1"), behaviour("e2", user="gone")
    entries = [Entry(0, 5, 0.0, None), Entry(1, 6, 0.0, gone), Entry(0, 7, 0.0, good)]
    result = parts.run(FeedBatch(entries, [1], {"i9"}, True))
    assert parts.calls == [
        ("observe_broken", 0, 5), ("observe_erased", 1, 6), ("observe", 0, 7, good), ("idle", [1]), ("finish",),
        ("timed_out", {"i9"}), ("advance", "i9"),
    ]  # fmt: skip
    assert (result.steps, result.losses, result.scored, result.missing) == (0, {}, [], {"after 0"})
    assert result.finishing and parts.thread.last_event_at is None
    parts.at_last_rows = True
    assert not parts.run(FeedBatch([], [], set(), True)).finishing, "its last rows are still to be learned"
    assert not parts.run().finishing


@pytest.mark.parametrize(
    ("due_after", "releases", "stopped", "shadow", "steps"),
    [
        (10**9, True, False, False, 4),
        (3, True, False, False, 3),
        (3, False, False, False, 4),
        (10**9, True, True, False, 1),
        (1, True, False, True, 2),  # one candidate at a time
    ],
)
def test_it_steps_until_a_release_can_be_made_or_the_process_ends(
    due_after: int, releases: bool, stopped: bool, shadow: bool, steps: int
) -> None:
    parts = Parts(batches=4)
    parts.due_after = due_after
    parts.shadow = SimpleNamespace(complete=False) if shadow else None
    result = parts.run(releases=releases, stopped=stopped)
    assert (result.steps, result.losses, result.missing) == (steps, {"loss": float(steps)}, {f"after {steps}"})
    assert parts.thread.last_event_at == 100 + steps and result.scored == ["rows"] * steps


def vector(item_id: str) -> EmbeddingRecord:
    return EmbeddingRecord(item_id, embedding(item_id, unit_vector(1), version="v"))


def test_a_vector_that_cannot_be_used_is_waited_for_further_and_a_tombstone_is_not() -> None:
    parts = Parts()
    parts.fetched = [EmbeddingRecord("i0", None), vector("i1"), vector("i2"), EmbeddingRecord("i3", None)]
    parts.refused = {"i2"}
    with capture_logs() as said:
        parts.thread.put_embeddings()
    assert parts.calls == [
        ("resolved", "i0"), ("made", "v", len(unit_vector(1)), [0, 1]), ("put", "i1"), ("resolved", "i1"),
        ("resolved", "i3"), ("delete_item", "i3"),
    ]  # fmt: skip
    assert [(line["event"], line["item_id"]) for line in said] == [("train.broken_vector", "i2")]


def test_a_query_refused_before_the_first_vector_is_not_waited_for_later() -> None:
    parts = Parts()
    query = query_item("0" * 32)
    parts.fetched = [EmbeddingRecord(query, None), EmbeddingRecord("i0", None)]
    parts.thread.put_embeddings()
    parts.fetched = [vector("i1")]
    parts.thread.put_embeddings()
    assert [call for call in parts.calls if call[0] == "delete_item"] == [("delete_item", query)]
    parts.fetched = [vector("i2")]
    parts.thread.put_embeddings()
    assert len([call for call in parts.calls if call[0] == "delete_item"]) == 1


@pytest.mark.parametrize("queries", [False, True])
def test_searches_that_rows_do_not_see_are_told_once_with_the_setting(queries: bool) -> None:
    parts = Parts()
    parts.fetched = [vector("i1")]
    parts.thread.put_embeddings()
    parts.config = configured(queries=queries)
    with capture_logs() as logs:
        parts.run()
        assert logs == []
        parts.searched = 3
        parts.run()
        parts.searched = 9
        parts.run()
    told = [(line["event"], line["log_level"], line["events"]) for line in logs]
    assert told == ([] if queries else [("train.searches_ignored", "warning", 3)])
    assert queries or "MIM_TRAINER__FEATURES__QUERIES=true" in logs[0]["fix"]


@pytest.mark.parametrize(
    ("seen", "kinds", "told"),
    [
        (("exposure", "click"), (), []),
        (("exposure", "purchase"), (), []),
        (("exposure", "click", "purchase", "cart"), (), ["cart", "purchase"]),
        (("click", "cart", "purchase"), ("purchase",), ["cart"]),
        (("click", "cart", "purchase"), ("cart", "purchase"), []),
    ],
)
def test_kinds_of_takes_that_have_no_output_are_told_once_with_the_setting(
    seen: tuple[str, ...], kinds: tuple[str, ...], told: list[str]
) -> None:
    parts = Parts()
    parts.fetched = [vector("i1")]
    parts.thread.put_embeddings()
    parts.config = configured(kinds=kinds)
    with capture_logs() as logs:
        parts.run()
        parts.kinds = dict.fromkeys(seen, 1)
        parts.run()
        parts.run()
    assert [line["kinds"] for line in logs if line["event"] == "train.kinds_ignored"] == ([told] if told else [])
    assert not told or "MIM_TRAINER__MODEL__KINDS" in logs[-1]["fix"]


async def test_users_are_forgotten_by_the_next_call_and_named_to_the_store_once() -> None:
    parts = Parts()
    erased: list[Any] = []
    parts.thread.scores = SimpleNamespace(forget=lambda users: erased.append(list(users)))  # type: ignore[assignment]
    users: Any = [SimpleNamespace(user_id="u1"), SimpleNamespace(user_id="u2")]
    await parts.thread.to_forget(users, "source", 1)
    assert parts.thread.has_more
    parts.__dict__["forget"] = lambda user: parts.calls.append(("forget", user)) or 1
    parts.run()
    parts.run()
    assert [call for call in parts.calls if call[0] == "forget"] == [("forget", "u1")] and erased == [["u1"]]
    assert parts.thread.take_erased() == ["u1"] and parts.thread.take_erased() == [] and not parts.thread.has_more
    parts.has_embeddings = True
    assert parts.thread.has_more


async def test_a_training_that_diverged_ends_with_the_setting_and_other_faults_as_they_are() -> None:
    def diverged() -> None:
        raise FloatingPointError("loss is nan")

    with pytest.raises(Misconfigured, match=r"training diverged: loss is nan.*MIM_TRAINER__LEARNER__LEARNING_RATE"):
        await in_thread(diverged)
    with pytest.raises(KeyError):
        await in_thread(lambda: {}["x"])
    assert await in_thread(lambda: 5) == 5
