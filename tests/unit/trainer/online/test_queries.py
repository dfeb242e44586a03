"""A trainer that reads what was searched: rows wait for vectors of queries, see them, and forget none of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from tests.factories.feeding import fetches, finish, pump, through_bytes
from tests.factories.samples import DAY0, DIM, behaviour, click_log, embedding, make_trainer, small_config, unit_vector
from trainer.networks.collate import collate, with_query
from trainer.online.trainer import OnlineTrainer
from trainer.samples.searches import QUERY_COLUMNS, is_hidden, searched

CONFIG = small_config(features={"queries": True})
WORDS = [f"word{n} i" for n in range(5)]


def searching(impressions: int, *, partitions: int = 1) -> list[list[Behaviour]]:
    """A log in which most exposures say what was searched, and many what was looked at before."""
    logs = click_log(impressions, partitions=partitions, late_takes=7)

    def led_to(n: int) -> dict[str, str | None]:
        return {
            "query_text": WORDS[n % 6] if n % 6 < 5 else None,
            "trigger_item": f"i{n // 3 % 4}" if n % 5 < 3 else None,
        }

    return [[event.model_copy(update=led_to(n)) for n, event in enumerate(log)] for log in logs]


def query(words: str) -> str:
    name = searched(words, None)
    assert name is not None
    return name


def put_queries(trainer: OnlineTrainer) -> None:
    for n, words in enumerate(WORDS):
        trainer.put_query(query(words), unit_vector(1_000 + n))


def learned(logs: list[list[Behaviour]], *, seed: int, most: int, queries_at: int, restart: bool = False) -> tuple:
    trainer = make_trainer(CONFIG, partitions=len(logs))
    for round_, (partition, events) in enumerate(fetches(logs, np.random.default_rng(seed), most=most)):
        if round_ == queries_at:
            put_queries(trainer)
        for offset, event in events:
            trainer.intake.observe(partition, offset, event)
        pump(trainer)
        if restart and round_ % 3 == 0:
            before, trainer = trainer, make_trainer(CONFIG, partitions=len(logs), items=0)
            trainer.restore(through_bytes(before.snapshot()))
    finish(trainer)
    weights = trainer.candidate().weights
    return trainer.progress.rows_sha256, trainer.progress.rows, [float(w.double().sum()) for w in weights.values()]


def test_rows_are_the_same_whenever_the_vectors_of_queries_come_and_after_restarts() -> None:
    logs = searching(160, partitions=2)
    first = learned(logs, seed=1, most=9, queries_at=0)
    assert first[1] > 150
    assert learned(logs, seed=2, most=40, queries_at=3) == first
    assert learned(logs, seed=3, most=5, queries_at=8, restart=True) == first


def shown(trainer: OnlineTrainer, *events: Behaviour) -> None:
    for offset, event in enumerate(events):
        trainer.intake.observe(0, offset, event)
    trainer.intake.finish()


def test_rows_wait_for_the_vector_of_their_query_until_it_comes_or_is_refused_or_waited_for_too_long() -> None:
    rows = [behaviour(f"x{n}", user="u2", item=f"i{n}", second=n, query_text="red shoe") for n in range(6)]
    assert not all(is_hidden("u2", DAY0 + n) for n in range(6))
    for how in ("comes", "refused", "overdue"):
        trainer = make_trainer(CONFIG)
        shown(trainer, *rows)
        assert trainer.intake.advance() == {query("red shoe")} and trainer.step() is None
        if how == "comes":
            trainer.put_query(query("red shoe"), unit_vector(5))
        elif how == "refused":
            trainer.delete_item(query("red shoe"))
        overdue = [query("red shoe")] if how == "overdue" else []
        assert not trainer.intake.advance(timed_out=overdue)
        report = trainer.step()
        assert report is not None and report.rows == 6


def test_a_trainer_that_reads_no_searches_waits_for_none_and_counts_them() -> None:
    trainer = make_trainer()
    shown(trainer, behaviour("x", query_text="red shoe"), behaviour("y", item="i2", query_image="AAAA"), behaviour("z"))
    assert not trainer.intake.advance() and trainer.step() is not None
    assert trainer.intake.searched == 2
    other = make_trainer()
    other.restore(through_bytes(trainer.snapshot()))
    assert other.intake.searched == 2


def test_the_query_is_the_newest_of_the_history_for_the_network_and_no_part_of_it_for_features() -> None:
    plain, taught = make_trainer(), make_trainer(CONFIG)
    taught.catalogue.put_embedding(embedding("i3", 3).model_copy(update={"title": "A red hat"}))
    events = [behaviour(f"t{n}", "click", user="u2", item=f"i{n}", second=n) for n in range(2)]
    rows = [behaviour("x", user="u2", item="i3", second=5, query_text="red shoe"), behaviour("y", user="u2", second=5)]
    batches = []
    for trainer in (plain, taught):
        if trainer is taught:
            trainer.put_query(query("red shoe"), unit_vector(9))
        shown(trainer, *events, *rows)
        trainer.intake.advance()
        ready = trainer.intake.next_batch()
        batches.append(collate(ready, None, trainer.catalogue, history_length=5, moment=trainer.moment))
    before, after = batches
    items = after.items_U[after.batch.history_BL.numpy()]
    number = taught.catalogue.find(query("red shoe"))
    history = [taught.catalogue.find(item) for item in ("i1", "i0")]
    assert items.tolist() == [[number, *history], [*history, 0]]
    np.testing.assert_array_equal(after.batch.vectors_UV[after.batch.history_BL[0, 0]].numpy(), unit_vector(9))
    width, dense = len(plain.config.features.names), after.batch.dense_BF.numpy()
    np.testing.assert_array_equal(dense[:, :width], before.batch.dense_BF[:, :width])
    np.testing.assert_array_equal(dense[:, width : width + 6], np.zeros((2, 6)))  # nothing was taken after it
    assert dense.shape[1] == width + 6 + 1 + len(QUERY_COLUMNS)
    np.testing.assert_allclose(dense[:, width + 7 :], [[1, 1 / 2, 1 / 3, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_a_history_without_any_query_is_left_as_it_is() -> None:
    history = np.array([[3, 2], [4, 0]])
    assert with_query(history, np.zeros(2, np.int64)) is history
    assert with_query(history, np.array([0, 9])).tolist() == [[3, 2, 0], [9, 4, 0]]


def test_drawn_exposures_and_corrections_have_the_search_of_their_take() -> None:
    trainer = make_trainer(small_config(features={"queries": True}, draw_exposures=2, draw_window_seconds=30))
    put_queries(trainer)
    takes = [
        behaviour(f"t{n}", "click", user=f"u{n}", item=f"i{n}", second=n, query_text=WORDS[n % 5]) for n in range(12)
    ]
    shown(trainer, *takes)
    trainer.intake.advance()
    rows = [row for _ in range(9) for row in trainer.intake.next_batch()]
    by_take = {row.event_id: row for row in rows if row.draw == 1}
    beside = [row for row in rows if row.draw > 1]
    assert beside and any(row.query for row in beside)
    for row in beside:
        own = by_take[row.event_id.split("~")[0]]
        assert (row.query, row.query_text) == (own.query, own.query_text)


def test_a_release_taught_queries_says_so_and_an_erased_user_leaves_no_words() -> None:
    trainer = make_trainer(CONFIG)
    put_queries(trainer)
    for offset, event in enumerate(searching(60)[0]):
        trainer.intake.observe(0, offset, event)
    pump(trainer)
    features = trainer.candidate().config["features"]
    assert isinstance(features, dict) and features["queries"] is True
    held = trainer.snapshot()
    assert any("word" in text for text in _texts(held))
    for user in range(12):
        trainer.forget(f"u{user}")
    assert not any("word" in text for text in _texts(trainer.snapshot()))


def _texts(state: object) -> list[str]:
    assert hasattr(state, "arrays")
    return [bytes(array).decode("latin-1") for array in state.arrays.values() if array.dtype == np.uint8]


@pytest.mark.parametrize("wrong", [DIM + 1, 0])
def test_a_query_of_another_width_is_refused(wrong: int) -> None:
    trainer = make_trainer(CONFIG)
    with pytest.raises(ValueError, match="shape"):
        trainer.put_query(query("red shoe"), np.zeros(wrong, np.float32))


def test_hidden_searches_neither_wait_nor_show() -> None:
    user = next(f"u{n}" for n in range(1_000) if is_hidden(f"u{n}", DAY0))
    trainer = make_trainer(CONFIG)
    shown(trainer, behaviour("x", user=user, query_text="red shoe"))
    assert not trainer.intake.advance()
    (row,) = trainer.intake.next_batch()
    assert replace(row, query=0) == row and row.query_text is None
