"""What is kept of items stays bounded while items come and go, whenever anything is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from tests.factories.feeding import fetches, finish, pump, through_bytes
from tests.factories.samples import DIM, behaviour, embedding, make_trainer, small_config, unit_vector
from trainer.negatives.sampler import TakeCounts
from trainer.online.shuffled_control import Shuffle
from trainer.online.trainer import OnlineTrainer
from trainer.provenance.journal import Segment
from trainer.provenance.rebuild import Rebuild
from trainer.samples.catalogue import ITEM_BYTES, Catalogue
from trainer.samples.join_rules import JoinRules

MOST = 20
CONFIG = small_config(
    item_megabytes=MOST * (ITEM_BYTES + 4 * DIM) / 1e6,
    history_length=3,
    correction_seconds=20,
    cart_correction_seconds=20,
    purchase_correction_seconds=20,
    window_takes=6,
    bank_takes=12,
    space_negatives=4,
    time_negatives=4,
    release_every_rows=40,
)
VARIANTS = ("ciubm", "ciubm_shuffled")


def passing_items(events: int, *, partitions: int = 2) -> list[list[Behaviour]]:
    """A log whose items are named for a while and replaced by others; now and then one of long ago is named again."""
    rng = np.random.default_rng(5)
    logs: list[list[Behaviour]] = [[] for _ in range(partitions)]
    for n in range(events):
        newest = n // 3
        item = f"i{max(newest - int(rng.integers(8)), 0) if n % 10 else int(rng.integers(newest + 1))}"
        user = int(rng.integers(6))
        log = logs[user % partitions]
        log.append(behaviour(f"x{n}", user=f"u{user}", item=item, second=2 * n))
        if n % 3 == 0:
            log.append(behaviour(f"t{n}", "click", user=f"u{user}", item=item, second=2 * n, exposure_id=f"x{n}"))
        elif n % 7 == 0:
            log.append(behaviour(f"c{n}", "cart", user=f"u{user}", item=item, second=2 * n + 12))
    return [sorted(log, key=lambda event: event.occurred_at) for log in logs]


def trained(
    logs: list[list[Behaviour]], *, seed: int, most: int, restart: bool = False
) -> tuple[OnlineTrainer, list[Segment]]:
    """The vectors are there before; with `restart` the trainer is replaced by its snapshot now and then."""
    trainer = make_trainer(CONFIG, partitions=len(logs), items=250, variants=VARIANTS)
    segments: list[Segment] = []
    for round_, (partition, events) in enumerate(fetches(logs, np.random.default_rng(seed), most=most)):
        for offset, event in events:
            trainer.intake.observe(partition, offset, event)
        pump(trainer)
        if trainer.release_due():
            candidate = trainer.candidate()
            assert candidate.segment is not None
            segments.append(Segment.from_state(through_bytes(candidate.segment.to_state())))
            trainer.begin_next()
        if restart and round_ % 5 == 0:
            before, trainer = trainer, make_trainer(CONFIG, partitions=len(logs), items=0, variants=VARIANTS)
            trainer.restore(through_bytes(before.snapshot()))
    finish(trainer)
    return trainer, segments


def figures(trainer: OnlineTrainer) -> tuple[str, int, list[float]]:
    weights = trainer.candidate().weights
    return trainer.progress.rows_sha256, trainer.catalogue.named, [float(w.double().sum()) for w in weights.values()]


def test_numbers_are_taken_where_the_log_says_however_it_was_fetched_and_after_restarts_too() -> None:
    logs = passing_items(330)
    plain, _ = trained(logs, seed=0, most=5)
    assert plain.catalogue.named < 2 * MOST + 10  # of 110 items that were named
    assert figures(trained(logs, seed=1, most=60)[0]) == figures(plain)
    assert figures(trained(logs, seed=2, most=9, restart=True)[0]) == figures(plain)


def test_rows_are_the_same_with_and_without_a_bound_and_are_rebuilt_with_few_numbers() -> None:
    logs = passing_items(330)
    _, segments = trained(logs, seed=0, most=5)
    rules = JoinRules.of(CONFIG, range(2))
    for segment in segments[-2:]:
        rebuilds = [Rebuild(segment, rules), Rebuild(segment, rules, most_items=10)]
        for partition, log in enumerate(logs):
            for offset, event in enumerate(log):
                for rebuild in rebuilds:
                    rebuild.observe(partition, offset, event)
        for rebuild in rebuilds:
            rebuild.advance(everything=True)
            assert rebuild.verify(segment.root).verified
        assert list(rebuilds[0].rows()) == list(rebuilds[1].rows())


def test_what_is_kept_of_deleted_items_does_not_grow_with_the_items_that_there_ever_were() -> None:
    trainer = make_trainer(CONFIG, items=0)
    rows, counts = [], []
    for n in range(400):
        user, second = f"u{n % 5}", 4 * n
        trainer.put_embedding(embedding(f"i{n}", n))
        trainer.intake.observe(0, 2 * n, behaviour(f"x{n}", user=user, item=f"i{n}", second=second))
        trainer.intake.observe(
            0,
            2 * n + 1,
            behaviour(f"t{n}", "click", user=user, item=f"i{n}", second=second, exposure_id=f"x{n}"),
        )
        pump(trainer)
        if n >= 20:
            trainer.delete_item(f"i{n - 20}")
        if trainer.release_due():
            trainer.begin_next()
        rows.append(len(trainer.catalogue))
        counts.append(len(trainer.snapshot().part("counts").arrays["items"]) if n % 100 == 0 else 0)
    assert max(rows) < 8 * MOST
    assert max(counts) <= MOST + 1


def test_an_item_that_is_named_again_has_a_new_number_and_its_vector() -> None:
    catalogue = Catalogue(DIM, most_items=2)
    for n in (1, 2):
        catalogue.put_embedding(embedding(f"i{n}", n))
        assert catalogue.number(f"i{n}") == n
    assert catalogue.crowded
    catalogue.retire([2])
    assert (catalogue.find("i1"), catalogue.find("i2"), catalogue.named) == (None, 2, 1)
    catalogue.put_embedding(embedding("i1", 9))
    assert catalogue.number("i1") == 3
    for number in (1, 3):  # a row that waits under the old number sees the newest vector too
        assert catalogue.item_id(number) == "i1"
        np.testing.assert_array_equal(catalogue.vectors(np.array([number]))[0], unit_vector(9))
    assert catalogue.numbers_of("i1") == [3, 1]
    catalogue.release([])
    assert catalogue.numbers_of("i1") == [3]
    with pytest.raises(KeyError):
        catalogue.item_id(1)


def test_the_row_of_an_item_without_vector_and_number_goes_to_another_one() -> None:
    catalogue = Catalogue(DIM, most_items=1)
    catalogue.put_embedding(embedding("gone", 1))
    number = catalogue.number("gone")
    catalogue.retire([])
    catalogue.delete_item("gone")
    assert catalogue.item_id(number) == "gone"  # a row may still name it
    catalogue.release([number])
    assert len(catalogue) == 1
    catalogue.retire([])
    restored = Catalogue(DIM, most_items=1)
    restored.restore(through_bytes(catalogue.snapshot()))
    for one in (catalogue, restored):
        assert one.releases
        one.release([])
        assert len(one) == 0 and not one.holds("gone")
        one.put_embedding(embedding("next", 2))
        assert len(one) == 1 and one.number("next") == 2
        assert np.isnan(one.published_at(0)) and one.content(2) == "content-next"
        assert len(one.snapshot().texts("ids")) == 2


def test_a_catalogue_of_an_earlier_build_is_read() -> None:
    catalogue = Catalogue(DIM)
    catalogue.put_embedding(embedding("named", 1))
    catalogue.number("named")
    state = through_bytes(catalogue.snapshot())
    for name in ("numbers", "retired"):
        del state.arrays[name]
    state.values.clear()
    state.put_texts("unmet.ids", ["unnamed"])
    state.put_texts("unmet.contents", ["content-unnamed"])
    state.arrays["unmet.vectors"] = unit_vector(2)[None]
    state.arrays["unmet.published_at"] = np.array([7.0])
    read = Catalogue(DIM)
    read.restore(state)
    assert (read.find("named"), read.find("unnamed"), read.holds("unnamed")) == (1, None, True)
    assert read.number("unnamed") == 2 and read.published_at(2) == 7.0
    np.testing.assert_array_equal(read.vectors(np.array([1, 2])), [unit_vector(1), unit_vector(2)])


def test_a_deleted_item_leaves_the_memory_under_every_number_that_it_had() -> None:
    trainer = make_trainer(CONFIG)
    trainer.intake.observe(0, 0, behaviour("t", "click", item="i0", second=0))
    for n in range(1, 40):
        trainer.intake.observe(0, n, behaviour(f"x{n}", item=f"i{n}", user="u2", second=5 * n))
    pump(trainer)
    assert trainer.snapshot().part("memory").arrays["window"][:, 0].tolist() == [1]
    trainer.catalogue.retire([])  # as if no history held it
    assert trainer.catalogue.number("i0") > 1
    trainer.delete_item("i0")
    assert not len(trainer.snapshot().part("memory").arrays["window"])


def test_takes_without_exposures_do_not_queue_for_ever() -> None:
    trainer = make_trainer(CONFIG, items=5)
    for n in range(300):
        trainer.intake.observe(0, n, behaviour(f"t{n}", "click", user=f"u{n % 7}", item=f"i{n % 5}", second=n))
        pump(trainer)
    assert len(trainer.intake.snapshot().arrays["takes"]) == CONFIG.window_takes + CONFIG.bank_takes
    assert len(trainer.snapshot().part("memory").arrays["window"]) == CONFIG.window_takes


def test_counts_of_takes_keep_the_items_taken_most() -> None:
    counts, restored = TakeCounts(1e9, most_items=4), TakeCounts(1e9, most_items=4)
    for item in (1, 1, 1, 2, 2, 3, 4, 5):
        counts.add(item, 0)
    assert len(counts) == 2
    restored.restore(through_bytes(counts.snapshot()))
    for one in (counts, restored):
        assert one.log_q(np.array([1]))[0] > one.log_q(np.array([2]))[0] > one.log_q(np.array([3]))[0]
        assert one.log_q(np.array([3]))[0] == one.log_q(np.array([99]))[0]


def test_counts_of_an_earlier_build_are_read() -> None:
    counts = TakeCounts(1e9)
    for item in (1, 1, 3):
        counts.add(item, 0)
    state = through_bytes(counts.snapshot())
    del state.arrays["items"]
    state.arrays["counts"] = np.array([0.0, 2.0, 0.0, 1.0, 0.0])
    read = TakeCounts(1e9)
    read.restore(state)
    np.testing.assert_array_equal(read.log_q(np.arange(6)), counts.log_q(np.arange(6)))


def test_the_shuffled_control_stays_a_permutation_of_the_newest_items() -> None:
    catalogue = Catalogue(DIM)
    shuffle, restored = (Shuffle(np.random.default_rng(0), most_items=8) for _ in range(2))
    for n in range(1, 31):
        catalogue.put_embedding(embedding(f"i{n}", n))
        shuffle.vectors(np.array([catalogue.number(f"i{n}")]), catalogue)
        if n == 20:
            restored.restore(through_bytes(shuffle.snapshot()))
        elif n > 20:
            restored.vectors(np.array([n]), catalogue)
    assert sorted(shuffle.items()) == list(range(23, 31))
    for one in (shuffle, restored):
        state = one.snapshot().arrays
        assert sorted(state["other"].tolist()) == sorted(state["met"].tolist())
    np.testing.assert_array_equal(shuffle.snapshot().arrays["other"], restored.snapshot().arrays["other"])
