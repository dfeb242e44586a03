"""Takes that no row follows leave the queue for the memory; which batch sees them there follows from the log alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from schemas.behaviours import Behaviour
from tests.factories.feeding import finish, pump, through_bytes
from tests.factories.samples import DIM, behaviour, embedding, make_trainer, small_config
from trainer.features.config import FeatureConfig
from trainer.networks.ciubm import CtrBatch
from trainer.samples.catalogue import ITEM_BYTES
from trainer.samples.rows import Impression

CONFIG = small_config(
    window_takes=6,
    bank_takes=12,
    space_negatives=4,
    time_negatives=4,
    correction_seconds=1000,
    cart_correction_seconds=1000,
    purchase_correction_seconds=1000,
    features=FeatureConfig(partners=2),  # so that it shows which takes are counted together
)
DRAWN = small_config(
    window_takes=2,
    bank_takes=3,
    space_negatives=2,
    time_negatives=2,
    attribution_seconds=60,
    draw_exposures=1,
    draw_window_seconds=20,
)


def exposures(count: int, start: int, *, head: str) -> list[Behaviour]:
    return [behaviour(f"{head}{n}", user=f"u{n % 3}", item=f"i{n}", second=start + 2 * n) for n in range(count)]


def takes(count: int, start: int, *, answers: str | None = "nothing that is known") -> list[Behaviour]:
    named = {} if answers is None else {"exposure_id": answers}
    return [
        behaviour(f"s{n}", "click", user=f"u{n % 3}", item=f"i{n * 7 % 40}", second=start + n, **named)
        for n in range(count)
    ]


LOGS = {
    "the last batch is a short one": (
        CONFIG,
        [
            *exposures(20, 0, head="x"),
            behaviour("t0", "click", user="u0", item="i0", second=1, exposure_id="x0"),
            behaviour("t18", "click", user="u0", item="i18", second=37, exposure_id="x18"),
            *takes(200, 100),
        ],
    ),
    "an old row is corrected": (
        CONFIG,
        [
            *exposures(23, 0, head="x"),
            behaviour("t0", "click", user="u0", item="i0", second=1, exposure_id="x0"),
            *takes(200, 100),
            behaviour("c", "click", user="u0", item="i21", second=320, exposure_id="x21"),
            *exposures(9, 400, head="y"),
        ],
    ),
    "exposures are drawn": (DRAWN, takes(200, 100, answers=None)),
}


@pytest.mark.parametrize("name", LOGS)
def test_negatives_and_features_do_not_depend_on_how_much_is_read_at_once(name: str) -> None:
    config, log = LOGS[name]
    log = sorted(log, key=lambda event: event.occurred_at)
    found = set()
    for most in (1, 10, 1000):
        for restarts in (False, True) if most == 10 else (False,):
            trainer = make_trainer(config)
            for offset, event in enumerate(log):
                trainer.intake.observe(0, offset, event)
                if (offset + 1) % most == 0:
                    pump(trainer)
                    if restarts:
                        before, trainer = trainer, make_trainer(config, items=0)
                        trainer.restore(through_bytes(before.snapshot()))
            finish(trainer)
            found.add((trainer.progress.rows, trainer.progress.rows_sha256))
    assert len(found) == 1 and found.pop()[0] > 20 - 1


def test_items_of_a_log_of_takes_alone_leave_although_nothing_is_ever_released() -> None:
    most = 40
    config = CONFIG.model_copy(update={"item_megabytes": most * (ITEM_BYTES + 4 * DIM) / 1e6})
    trainer = make_trainer(config, items=0)
    for n in range(1000):
        trainer.put_embedding(embedding(f"i{n}", n % 40))
        taken = behaviour(f"s{n}", "click", user=f"u{n % 3}", item=f"i{n}", second=n, exposure_id="unknown")
        trainer.intake.observe(0, n, taken)
        pump(trainer)
        if n >= 50:
            trainer.delete_item(f"i{n - 50}")
    assert trainer.progress.rows == 0 and len(trainer.catalogue) < 4 * most
    assert len(trainer._uncounted) <= config.batch_rows


class TakesSeen:
    """How many takes of its item the network reads for each exposure."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        place = FeatureConfig().names.index("takes")
        for row, dense in zip(rows, batch.dense_BF.numpy(), strict=True):
            self.of[row.event_id] = round(float(np.expm1(dense[place])))


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_rows_that_wait_see_no_later_take_and_rows_after_them_see_what_was_counted_without_rows(most: int) -> None:
    trainer = make_trainer(CONFIG)
    seen = TakesSeen()
    trainer.observers.append(seen)
    size = CONFIG.batch_rows
    log = [behaviour(f"x{n}", user=f"u{n}", item="i1", second=10 + n) for n in range(size - 1)]
    log += [
        behaviour(f"t{n}", "click", user=f"u{n}", item="i1", second=100 + n, exposure_id="unknown") for n in range(300)
    ]
    log += [behaviour(f"y{n}", user=f"u{n}", item="i1", second=500 + n) for n in range(size + 1)]
    for offset, event in enumerate(log):
        trainer.intake.observe(0, offset, event)
        if (offset + 1) % most == 0:
            pump(trainer)
    finish(trainer)
    assert {seen.of[f"x{n}"] for n in range(size - 1)} == {0}
    beside = seen.of["y0"]
    assert 300 - 18 - 2 * size <= beside < 300, "the first row after them shares their step"
    assert {seen.of[f"y{n}"] for n in range(1, size + 1)} == {300}


def test_takes_that_wait_for_a_row_name_their_users_only_where_an_erasure_finds_them() -> None:
    trainer = make_trainer(CONFIG)
    log = [*exposures(CONFIG.batch_rows, 0, head="x"), *takes(3, 2 * CONFIG.batch_rows - 2, answers=None)]
    for offset, event in enumerate(log):
        trainer.intake.observe(0, offset, event)
    finish(trainer)
    held = trainer.state().frozen()
    copy = held.copies["uncounted/"]
    assert copy.user_column == "user" and len(copy.numbers) == len(trainer._uncounted) > 0
    assert not any(name.startswith("uncounted/") for name in held.small_arrays)
    user = trainer.snapshot().texts("uncounted/user")[0]
    trainer.forget(user)
    assert user not in trainer.snapshot().texts("uncounted/user")
