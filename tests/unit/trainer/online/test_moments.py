"""Features of the moment in training: what a row sees, and that nothing else decides it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from tests.factories.feeding import finish, is_balanced, observe_all, pump, through_bytes
from tests.factories.samples import behaviour, click_log, make_trainer, small_config
from trainer.features.config import FeatureConfig
from trainer.networks.ciubm import CtrBatch
from trainer.online.trainer import OnlineTrainer
from trainer.provenance.journal import Segment
from trainer.samples.rows import Impression

NAMES = FeatureConfig().names
CORRECTING = {"correction_seconds": 200, "cart_correction_seconds": 200, "correction_megabytes": 8}


class Seen:
    """The features of each row, as the network gets them."""

    def __init__(self) -> None:
        self.rows: list[Impression] = []
        self.dense: list[np.ndarray] = []

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        self.rows += rows
        self.dense += list(batch.dense_BF.numpy().copy())

    def of(self, event_id: str, name: str) -> float:
        place = next(n for n, row in enumerate(self.rows) if row.event_id == event_id)
        return float(self.dense[place][NAMES.index(name)])


def watched(trainer: OnlineTrainer) -> Seen:
    seen = Seen()
    trainer.observers.append(seen)
    return seen


def shown_and_taken(n: int, item: str, second: int) -> list[Behaviour]:
    shown = behaviour(f"x{n}", user=f"u{n}", item=item, second=second)
    return [shown, behaviour(f"t{n}", "click", user=f"u{n}", item=item, second=second, exposure_id=f"x{n}")]


def takes_seen(seconds: Sequence[int], *, batch_rows: int = 1) -> list[float]:
    """How many takes of the only item each impression sees, all taken at once."""
    trainer = make_trainer(small_config(batch_rows=max(2, batch_rows)))
    seen = watched(trainer)
    observe_all(trainer, [event for n, at in enumerate(seconds) for event in shown_and_taken(n, "i1", at)])
    finish(trainer)
    return [round(float(np.expm1(seen.of(f"x{n}", "takes")))) for n in range(len(seconds))]


def test_a_row_sees_the_takes_before_the_second_that_the_step_before_ended_with() -> None:
    # steps of two rows: the first two see nothing, the next two what was taken before the second row's second
    assert takes_seen([0, 10, 20, 30, 40, 50]) == [0, 0, 1, 1, 3, 3]


def test_no_row_sees_a_take_of_its_own_second_also_when_a_step_ends_within_it() -> None:
    assert takes_seen([0, 5, 5, 5, 5, 9]) == [0, 0, 1, 1, 1, 1]


def test_a_drawn_exposure_does_not_see_the_take_that_it_was_drawn_from() -> None:
    log = [event for n, at in enumerate((0, 1)) for event in shown_and_taken(n, "i1", at)]
    log += [*shown_and_taken(7, "i2", 2), behaviour("filler", item="i3", second=3)]
    drawn = behaviour("d", user="u9", item="i1", second=50)
    source = {"drawn_from": "t1", "drawn_at": log[3].occurred_at}
    log += [drawn.model_copy(update=source), behaviour("s", user="u8", item="i1", second=50)]
    trainer = make_trainer(small_config(batch_rows=2))
    seen = watched(trainer)
    observe_all(trainer, log)
    finish(trainer)
    assert {row.event_id for row in seen.rows[4:]} == {"d", "s"}, "both of one step"
    counts = {name: round(float(np.expm1(seen.of(name, "takes")))) for name in ("d", "s")}
    assert counts == {"d": 1, "s": 2}


def test_the_hash_over_the_rows_covers_their_features() -> None:
    def run(**over: object) -> tuple[str, str]:
        trainer = make_trainer(small_config(**over))
        observe_all(trainer, click_log(60)[0])
        finish(trainer)
        segment = trainer.candidate().segment
        assert segment is not None
        return trainer.progress.rows_sha256, segment.root

    plain = run()
    others = run(features=FeatureConfig(history_length=1))
    assert plain == run() and plain[0] != others[0] and plain[1] != others[1]


def test_the_journal_keeps_the_features_that_the_network_saw() -> None:
    trainer = make_trainer()
    seen = watched(trainer)
    observe_all(trainer, click_log(60)[0])
    finish(trainer)
    kept = trainer.candidate().segment
    assert kept is not None
    again = Segment.from_state(through_bytes(kept.to_state()))
    np.testing.assert_array_equal(np.concatenate([step.features for step in again.steps]), np.stack(seen.dense))


@pytest.mark.parametrize("killed_at", [None, 10, 55, 90])
def test_a_correction_has_the_features_of_the_impression_that_it_repeats(killed_at: int | None) -> None:
    (log,) = click_log(120, late_takes=4)
    trainer = make_trainer(small_config(**CORRECTING))
    seen = watched(trainer)
    for offset, event in enumerate(log):
        trainer.intake.observe(0, offset, event)
        if offset % 7 == 0:  # some corrections come before their impressions are learned from, some after
            pump(trainer)
        if offset == killed_at:
            again = make_trainer(small_config(**CORRECTING))
            again.restore(through_bytes(trainer.snapshot()))
            again.observers.append(seen)
            trainer = again
    finish(trainer)
    assert is_balanced(trainer.intake.counts)
    first = {row.shown_as: dense for row, dense in zip(seen.rows, seen.dense, strict=True) if not row.correction}
    repeated = [(row, dense) for row, dense in zip(seen.rows, seen.dense, strict=True) if row.correction]
    assert len(repeated) > 5
    for row, dense in repeated:
        np.testing.assert_array_equal(dense, first[row.shown_as])


def test_a_trainer_that_was_killed_sees_the_same_features() -> None:
    (log,) = click_log(150, late_takes=5)
    trainer, killed = make_trainer(small_config(**CORRECTING)), make_trainer(small_config(**CORRECTING))
    for offset, event in enumerate(log):
        for one in (trainer, killed):
            one.intake.observe(0, offset, event)
            pump(one)
        if offset % 40 == 39:
            state = through_bytes(killed.snapshot())
            killed = make_trainer(small_config(**CORRECTING))
            killed.restore(state)
    for one in (trainer, killed):
        finish(one)
    assert trainer.progress.rows_sha256 == killed.progress.rows_sha256


def test_a_deleted_item_and_a_forgotten_user_leave_the_state() -> None:
    trainer = make_trainer(small_config(batch_rows=2))
    observe_all(trainer, [event for n in range(6) for event in shown_and_taken(n, f"i{n % 2}", 10 * n)])
    pump(trainer)
    trainer.delete_item("i1")
    number = trainer.catalogue.find("i1")
    assert number is not None
    assert trainer._moment.states(np.array([number])).takes.takes_U.tolist() == [0]
    before = len(trainer._moment._users)
    trainer.forget("u0")
    assert len(trainer._moment._users) == before - 1
