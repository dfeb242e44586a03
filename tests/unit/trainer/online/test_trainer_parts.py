"""That each part of the trainer gets what is meant for it, told by values that only it has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories.feeding import finish, observe_all, pump, through_bytes
from tests.factories.samples import behaviour, click_log, make_catalogue, make_trainer, small_config
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.networks.learner import Learner
from trainer.online.shuffled_control import Shuffle
from trainer.online.trainer import OnlineTrainer
from trainer.samples.catalogue import Catalogue


def candidates_of(**over: Any) -> list[int]:
    """How many distinct candidates the last steps had."""
    trainer = make_trainer(small_config(window_takes=6, **over))
    log = [behaviour(f"t{n}", "click", user=f"v{n}", item=f"i{n}", second=n) for n in range(24)]
    log += [behaviour(f"s{n}", "click", user=f"u{n}", item="i30", second=25) for n in range(8)]
    for n in range(8):
        log.append(behaviour(f"x{n}", user=f"u{n}", item="i31", second=30))
        log.append(behaviour(f"y{n}", "click", user=f"u{n}", item="i31", second=31, exposure_id=f"x{n}"))
    log.sort(key=lambda event: event.occurred_at)
    observe_all(trainer, log)
    finish(trainer)
    return [len(step.negatives or ()) for step in trainer.journal.segment().steps]


def test_space_and_time_are_drawn_in_their_numbers_within_their_bounds() -> None:
    # the window holds the last takes alone (one item), the bank those before
    assert candidates_of(space_negatives=20, time_negatives=0) == [2]
    assert candidates_of(space_negatives=0, time_negatives=7) == [8]
    assert candidates_of(space_negatives=0, time_negatives=100) == [26]
    assert candidates_of(space_negatives=0, time_negatives=100, bank_takes=4) == [4]
    assert candidates_of(space_negatives=0, time_negatives=100, bank_seconds=11) == [7]


def test_takes_are_counted_and_remembered_up_to_the_last_row_of_the_batch_and_without_their_users() -> None:
    trainer = make_trainer(small_config(batch_rows=2, lateness_seconds=0, attribution_seconds=0))
    log = [behaviour(f"x{n}", item=f"i{n}", user=f"u{n}", second=10 * n) for n in range(3)]
    log += [behaviour(f"t{n}", "click", item=f"i{20 + n}", user="taker", second=n) for n in range(0, 30, 5)]
    log.sort(key=lambda event: event.occurred_at)
    observe_all(trainer, [*log, behaviour("end", user="u9", second=60)])
    trainer.intake.advance()
    assert trainer.step() is not None
    memory = SpaceTimeMemory(window_seconds=100, window_takes=1024, bank_takes=8192, bank_seconds=1e9)
    memory.restore(trainer.snapshot().part("memory").arrays)
    items = [trainer.catalogue.item_id(item) for item in memory.window_items().tolist()]
    assert items == ["i20", "i25", "i30"]
    counts = trainer.snapshot().part("counts").arrays["items"].tolist()
    assert [trainer.catalogue.item_id(item) for item in counts] == items
    assert {take.user_id for take in trainer._memory._window} == {""}


def test_the_learner_gets_the_share_in_time_the_weights_of_rows_and_histories_of_the_set_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[Any, int, int]] = []
    honest = Learner.step

    def watched(
        self: Learner, batch: Any, labels: Any, contrastive: Any, *, in_time: Any, weights_B: Any, kinds: Any
    ) -> Any:
        given.append((in_time, batch.history_BL.shape[1], 0 if weights_B is None else int((weights_B == 0).sum())))
        return honest(self, batch, labels, contrastive, in_time=in_time, weights_B=weights_B, kinds=kinds)

    monkeypatch.setattr(Learner, "step", watched)
    trainer = make_trainer(small_config(batch_rows=4, history_length=3))
    log = click_log(60, users=2, late_takes=2)[0]
    log.append(
        behaviour(
            "buy",
            "purchase",
            user=log[-1].user_id,
            item=log[-1].item_id,
            second=log[-1].occurred_at.timestamp() - 1_700_000_000 + 30,
        )
    )
    observe_all(trainer, log)
    shares = []
    trainer.intake.finish()
    trainer.intake.advance()
    while True:
        shares.append(trainer.progress.in_time())
        if trainer.step() is None:
            break
        trainer.intake.advance()
    assert [share for share, _, _ in given] == shares[:-1] and min(shares) < (1.0,)
    assert max(width for _, width, _ in given) == 3
    assert sum(zero for _, _, zero in given) == trainer.progress.upgraded > 0


class Watcher:
    """Stands where an evaluation of releases does."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def observe(self, rows: list[Any], batch: Any) -> None:
        self.calls["rows"] += len(rows)

    def forget(self, user_id: str) -> None:
        self.calls[user_id] += 1


def test_both_evaluations_see_every_row_and_every_user_who_is_forgotten() -> None:
    trainer, one, other = make_trainer(), Watcher(), Watcher()
    trainer.shadow, trainer.stand_in = one, other  # type: ignore[assignment]
    observe_all(trainer, click_log(40)[0])
    pump(trainer)
    trainer.forget("u3")
    assert one.calls == other.calls == {"rows": trainer.progress.rows, "u3": 1}
    assert "u3" not in trainer.journal.snapshot().texts("users") and "u3" not in trainer.progress.snapshot().part(
        "recent"
    ).texts("user")


def test_steps_of_the_journal_are_numbered_on_from_candidate_to_candidate() -> None:
    trainer = make_trainer(small_config(batch_rows=4))
    observe_all(trainer, click_log(40)[0])
    trainer.intake.advance()
    firsts = []
    for _ in range(3):
        trainer.step()
        segment = trainer.candidate().segment
        assert segment is not None
        firsts.append((segment.first_row, segment.first_step, min(use.step for use in segment.vectors)))
        trainer.begin_next()
    assert firsts == [(0, 0, 0), (4, 1, 1), (8, 2, 2)]


@pytest.mark.parametrize(("rows", "due"), [(15, True), (16, True), (17, False)])
def test_a_release_is_due_at_its_number_of_rows(rows: int, due: bool) -> None:
    trainer = make_trainer(small_config(release_every_rows=rows, batch_rows=8))
    observe_all(trainer, click_log(60)[0])
    trainer.intake.advance()
    trainer.step()
    trainer.step()
    assert trainer.progress.rows == 16 and trainer.release_due() == due


@pytest.mark.parametrize(("seconds", "due"), [(29, True), (30, True), (31, False)])
def test_a_release_is_due_at_its_span_of_event_time(seconds: int, due: bool) -> None:
    trainer = make_trainer(small_config(release_every_event_seconds=seconds, release_every_rows=10**6, batch_rows=4))
    observe_all(trainer, [behaviour(f"x{n}", user=f"u{n}", second=10 * n) for n in range(6)])
    trainer.intake.advance()
    trainer.step()
    assert trainer.release_due() == due


def test_a_restored_trainer_draws_the_same_negatives_and_learns_the_same_rows() -> None:
    config = small_config(window_takes=5, bank_takes=20, space_negatives=3, time_negatives=3, batch_rows=4)
    log, trainer, again = click_log(60)[0], make_trainer(config), make_trainer(config.model_copy(update={"seed": 5}))
    observe_all(trainer, log[:50])
    pump(trainer)
    again.restore(through_bytes(trainer.snapshot()))
    for each in (trainer, again):
        for offset in range(50, len(log)):
            each.intake.observe(0, offset, log[offset])
        finish(each)
    ours, theirs = trainer.candidate(), again.candidate()
    assert ours.rows_sha256 == theirs.rows_sha256 and ours.segment is not None and theirs.segment is not None
    assert ours.segment.root == theirs.segment.root and ours.metrics == theirs.metrics
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)


# ---- the shuffled control ----------------------------------------------------------------------------------------


def partners(shuffle: Shuffle, catalogue: Catalogue, items: np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(vector) for vector in shuffle.vectors(items, catalogue)["vectors_UV"].tolist()]


def test_items_without_a_vector_take_no_part_in_the_shuffle_until_they_have_one() -> None:
    catalogue = make_catalogue(12)
    for item in ("i5", "i9"):
        catalogue.delete_item(item)
    items = np.arange(13)
    found = Shuffle(np.random.default_rng(0)).vectors(items, catalogue)
    assert found["has_vector_U"].tolist() == [n not in (0, 5, 9) for n in range(13)]
    assert not found["vectors_UV"][[0, 5, 9]].any()


def test_a_restored_shuffle_goes_on_with_the_same_partners() -> None:
    catalogue = make_catalogue(40)
    one, other = Shuffle(np.random.default_rng(0)), Shuffle(np.random.default_rng(5))
    partners(one, catalogue, np.arange(1, 20))
    other.restore(through_bytes(one.snapshot()))
    for items in (np.arange(1, 20), np.arange(10, 41), np.arange(41)):
        assert partners(one, catalogue, items) == partners(other, catalogue, items)
    first = [partners(Shuffle(np.random.default_rng(seed)), catalogue, np.arange(1, 3)) for seed in range(20)]
    assert len({tuple(pair) for pair in first}) == 2  # the second item keeps its own or swaps with the first


def test_variants_differ_in_what_they_see_and_the_control_has_a_seed_of_its_own() -> None:
    trainer = make_trainer(small_config(), variants=("ciubm", "din", "ciubm_shuffled"))
    observe_all(trainer, click_log(40)[0])
    pump(trainer)
    state = trainer.snapshot()
    names = {name for name in state.arrays if name.startswith("learner-")}
    assert any("projection" in name for name in names if name.startswith("learner-ciubm/"))
    assert not any("projection" in name for name in names if name.startswith("learner-din/"))
    (scored,) = trainer.progress.drain_scores()[:1]
    assert not np.allclose(scored.scores["ciubm"], scored.scores["ciubm_shuffled"])
    assert state.part("shuffle").values["rng"] != np.random.default_rng(trainer.config.seed + 1).bit_generator.state
    expected = np.random.default_rng(trainer.config.seed + 1)
    for place in range(len(state.part("shuffle").arrays["met"])):
        expected.integers(place + 1)
    assert state.part("shuffle").values["rng"] == expected.bit_generator.state


def test_dropout_goes_on_where_it_was_after_a_restart_and_draws_anew_each_step() -> None:
    model = small_config().model.model_copy(update={"dropout": 0.5})

    def fed() -> OnlineTrainer:
        trainer = make_trainer(small_config(model=model))
        observe_all(trainer, click_log(40)[0])
        trainer.intake.advance()
        return trainer

    states = []
    trainer = fed()
    for _ in range(3):
        states.append(trainer.snapshot().arrays["torch_rng"].tobytes())
        trainer.step()
    assert len(set(states)) == 3
    again = fed()
    again.restore(through_bytes(trainer.snapshot()))
    for each in (trainer, again):
        torch.manual_seed(id(each) % 1000)
        each.step()
    ours, theirs = trainer.candidate().weights, again.candidate().weights
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
