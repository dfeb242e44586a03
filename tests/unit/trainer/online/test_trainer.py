from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.behaviours import Behaviour
from tests.factories.feeding import fetches, finish, is_balanced, observe_all, pump
from tests.factories.samples import (
    behaviour,
    click_log,
    embedding,
    make_catalogue,
    make_trainer,
    small_config,
    unit_vector,
)
from trainer.metrics import ScoredRows, auc
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.online.shuffled_control import Shuffle
from trainer.online.trainer import OnlineTrainer


def feed(trainer: OnlineTrainer, logs: list[list[Behaviour]], *, seed: int = 0, chunk: int = 7) -> None:
    """Feed partitions in random order, batches of random size, moving the trainer now and then, as fetches would."""
    rng = np.random.default_rng(seed)
    for partition, events in fetches(logs, rng, most=chunk):
        for offset, event in events:
            trainer.intake.observe(partition, offset, event)
        if rng.random() < 0.5:
            pump(trainer)
        assert is_balanced(trainer.intake.counts)
    finish(trainer)


def memory_of(trainer: OnlineTrainer) -> SpaceTimeMemory:
    """Window and bank, as a snapshot has them."""
    bounds = {"window_seconds", "window_takes", "bank_takes", "bank_seconds"}
    memory = SpaceTimeMemory(**trainer.config.model_dump(include=bounds))
    memory.restore(trainer.snapshot().part("memory").arrays)
    return memory


def scores(trainer: OnlineTrainer) -> ScoredRows:
    return ScoredRows.concatenate(trainer.progress.drain_scores())


def test_everything_sent_is_trained_and_the_accounts_balance() -> None:
    trainer = make_trainer(partitions=3)
    logs = click_log(200, partitions=3)
    feed(trainer, logs)
    sent = sum(map(len, logs))
    counts = trainer.intake.counts
    assert (counts.received, counts.trained, counts.pending) == (sent, sent, 0)
    assert trainer.intake.offsets.committed_offsets() == {p: len(log) for p, log in enumerate(logs)}


def test_late_repeated_and_broken_events_are_counted_and_not_trained() -> None:
    trainer = make_trainer()
    log = click_log(40)[0]
    observe_all(trainer, [*log, log[0], log[-1]])
    trainer.intake.observe(0, 1000, behaviour("old", second=-500))
    trainer.intake.observe_broken(0, 1001)
    finish(trainer)
    counts = trainer.intake.counts
    assert (counts.trained, counts.late, counts.dead_lettered) == (len(log), 1, 1)
    assert counts.duplicate == 2
    assert is_balanced(counts)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000), st.sampled_from([1, 3, 50]))
def test_same_records_give_the_same_training_whatever_the_fetches(one: int, other: int, chunk: int) -> None:
    def run(seed: int, size: int) -> tuple[str, np.ndarray, list[np.ndarray]]:
        trainer = make_trainer(partitions=3, variants=("ciubm", "din", "ciubm_shuffled"))
        feed(trainer, click_log(120, partitions=3), seed=seed, chunk=size)
        rows = scores(trainer)
        weights = [tensor.numpy() for tensor in trainer.candidate().weights.values()]
        return trainer.progress.rows_sha256, np.stack(list(rows.scores.values())), weights

    first, second = run(one, chunk), run(other, 7)
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])
    for mine, yours in zip(first[2], second[2], strict=True):
        np.testing.assert_array_equal(mine, yours)


def test_when_vectors_come_does_not_change_what_is_learned() -> None:
    log = click_log(120)[0]

    def run(order: Iterable[int], every: int) -> str:
        trainer = make_trainer(items=0)
        vectors = (embedding(f"i{item}", item) for item in order)
        for offset, event in enumerate(log):
            trainer.intake.observe(0, offset, event)
            if offset % every == 0 and (vector := next(vectors, None)):
                trainer.put_embedding(vector)
            pump(trainer)
        for vector in vectors:
            trainer.put_embedding(vector)
        finish(trainer)
        assert trainer.intake.counts.pending == 0
        return trainer.progress.rows_sha256

    assert run(range(40), 1) == run(reversed(range(40)), 3) == run(range(40), 1000)


def waiting_for_new(events: list[Behaviour]) -> OnlineTrainer:
    """A trainer with ten items that cannot go on before it has the vector of another."""
    trainer = make_trainer(items=10)
    observe_all(trainer, events)
    trainer.intake.finish()
    assert trainer.intake.advance() == {"new"}
    assert trainer.step() is None
    return trainer


def assert_batch_is_learned(trainer: OnlineTrainer) -> None:
    report = trainer.step()
    assert report is not None and report.rows == 8


def test_head_waits_for_its_vector_and_goes_on_after_vector_tombstone_or_bound() -> None:
    items = ["new" if n == 3 else f"i{n}" for n in range(8)]
    events = [behaviour(f"x{n}", item=item, user=f"u{n}", second=n) for n, item in enumerate(items)]
    with_vector, with_tombstone, timed_out = (waiting_for_new(events) for _ in range(3))
    with_vector.put_embedding(embedding("new", 99))
    with_tombstone.delete_item("new")
    assert not timed_out.intake.advance(timed_out=["new"])
    for trainer in (with_vector, with_tombstone, timed_out):
        assert_batch_is_learned(trainer)


def test_a_batch_waits_for_the_vectors_of_takes_that_may_become_its_negatives() -> None:
    shown = [behaviour(f"x{n}", item=f"i{n}", user=f"u{n}", second=n) for n in range(8)]
    trainer = waiting_for_new([*shown, behaviour("taken", "purchase", item="new", user="u9", second=7)])
    trainer.put_embedding(embedding("new", 99))
    assert not trainer.intake.advance()
    assert_batch_is_learned(trainer)


def test_scores_of_a_batch_are_made_before_it_is_learned_from() -> None:
    log = click_log(60)[0]

    def first_scores(flip: bool) -> np.ndarray:
        trainer = make_trainer()
        observe_all(trainer, [event for event in log if not (flip and event.kind.is_take)])
        trainer.intake.finish()
        trainer.intake.advance()
        trainer.step()
        return scores(trainer).scores["ciubm"][:1]

    # the first row has no history: taking all labels away may not change its score, or the label leaked into it
    np.testing.assert_array_equal(first_scores(False), first_scores(True))


def test_vector_of_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="enc-2"):
        make_trainer().put_embedding(embedding("i1", 1, version="enc-2"))


def test_deleted_item_leaves_window_and_bank() -> None:
    trainer = make_trainer(small_config(window_takes=3))
    log = [behaviour(f"t{n}", "click", item=f"i{n % 3}", second=n) for n in range(9)]
    observe_all(trainer, [*log, *(behaviour(f"x{n}", item="i7", user=f"u{n}", second=20 + n) for n in range(9))])
    finish(trainer)
    number = trainer.catalogue.find("i1")
    before, kept = memory_of(trainer), {0}
    assert number in before.window_items() and number in before.bank_items(0)
    trainer.delete_item("i1")
    memory = memory_of(trainer)
    for items in (memory.window_items(), memory.bank_items(0)):
        kept |= set(items.tolist())
    assert number not in kept and {trainer.catalogue.item_id(item) for item in kept} == {"", "i0", "i2"}
    assert not trainer.catalogue.has_vector(number) and trainer.candidate().offsets


def test_release_is_due_by_rows_and_carries_what_it_was_trained_on() -> None:
    trainer = make_trainer(small_config(release_every_rows=16, batch_rows=8))
    observe_all(trainer, click_log(100)[0])
    trainer.intake.advance()
    trainer.step()
    assert not trainer.release_due()
    trainer.step()
    assert trainer.release_due()
    candidate = trainer.candidate()
    assert (candidate.rows_trained, candidate.steps) == (16, 2)
    assert trainer.release_due() and trainer.candidate().segment == candidate.segment  # until the next one's rows begin
    trainer.begin_next()
    assert not trainer.release_due() and candidate.segment is not None and candidate.segment.rows == 16
    trainer.intake.advance()
    before = {name: tensor.clone() for name, tensor in candidate.weights.items()}
    trainer.step()
    assert all(bool((before[name] == tensor).all()) for name, tensor in candidate.weights.items())


def test_content_signal_is_found_and_the_shuffled_control_does_not_find_it() -> None:
    # users like one half-space of content; items are many and each is met rarely, so ids alone say little
    rng = np.random.default_rng(0)
    names = [f"i{n}" for n in range(600)]
    matrix = np.stack([unit_vector(n) for n in range(600)])
    trainer = make_trainer(small_config(batch_rows=64), items=600, variants=("ciubm", "din", "ciubm_shuffled"))
    tastes = matrix[rng.integers(600, size=150)]
    events = []
    for second in range(4000):
        user = int(rng.integers(150))
        liked = names[int(rng.choice(np.argsort(-matrix @ tastes[user])[:30]))]
        other = names[int(rng.integers(600))]
        for name, kind, item in (("x", "exposure", liked), ("t", "click", liked), ("y", "exposure", other)):
            events.append(behaviour(f"{name}{second}", kind, user=f"u{user}", item=item, second=second))
    observe_all(trainer, events)
    finish(trainer)
    rows = scores(trainer)
    late = np.arange(len(rows)) > len(rows) // 2
    found = {name: auc(rows.label[late], values[late]) for name, values in rows.scores.items()}
    assert found["ciubm"] > 0.8
    assert found["ciubm"] > found["din"] + 0.05
    assert found["ciubm"] > found["ciubm_shuffled"] + 0.05


def test_shuffle_is_a_permutation_at_every_moment() -> None:
    catalogue = make_catalogue(199)
    shuffle = Shuffle(np.random.default_rng(0))
    for met in range(20, 200, 20):
        items = np.arange(met)
        found = shuffle.vectors(items, catalogue)["vectors_UV"].numpy()
        own = catalogue.vectors(items)
        key = {tuple(vector): n for n, vector in enumerate(own.tolist())}
        assert sorted(key[tuple(vector)] for vector in found.tolist()) == list(range(met))
    assert np.mean((found[1:] == own[1:]).all(1)) < 0.1


@pytest.mark.parametrize("variants", [("din",), ("ciubm", "wide_and_deep")])
def test_unknown_variants_are_refused(variants: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="variants"):
        make_trainer(variants=variants)


def test_a_release_is_due_after_so_much_event_time_where_rows_are_few() -> None:
    trainer = make_trainer(small_config(release_every_rows=10_000, release_every_event_seconds=60, batch_rows=4))
    spans, since = [], None
    for offset, event in enumerate(click_log(200)[0]):
        trainer.intake.observe(0, offset, event)
        trainer.intake.advance()
        while (report := trainer.step()) is not None:
            since = since or report.last_event_at
            if trainer.release_due():
                spans.append(report.last_event_at - since)
                since = trainer.candidate().last_event_at
                trainer.begin_next()
            trainer.intake.advance()
    assert len(spans) >= 4 and all(50 <= span < 90 for span in spans)
