"""A trainer that was cut at any moment, written, read and restored goes on to the last digit as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams.stores.artifacts.arrays import pack_arrays
from tests.factories.checkpoints import SnapshotChain, make_store
from tests.factories.feeding import fetches, is_balanced, pump, through_bytes
from tests.factories.samples import SMALL_MODEL, behaviour, click_log, embedding, make_trainer, small_config
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.samples.window import ObserveResult
from trainer.state import State

VARIANTS = ("ciubm", "din", "ciubm_shuffled")
CONFIG = small_config(
    bank_takes=11,
    window_takes=7,
    space_negatives=4,
    time_negatives=4,
    max_users=9,
    release_every_rows=32,
    model=SMALL_MODEL.model_copy(update={"dropout": 0.1, "id_rows": 16}),
)


def fresh(config: Any = CONFIG, partitions: int = 2) -> OnlineTrainer:
    return make_trainer(config, partitions=partitions, items=0, variants=VARIANTS)


def digest(state: State) -> dict[str, bytes]:
    arrays = {name: a.tobytes() + str((a.shape, a.dtype)).encode() for name, a in state.arrays.items()}
    return arrays | {"values": json.dumps(state.values, sort_keys=True).encode()}


def assert_same(ours: State, theirs: State) -> None:
    mine, yours = digest(ours), digest(theirs)
    assert mine.keys() == yours.keys()
    assert [name for name in mine if mine[name] != yours[name]] == []


Action = tuple[str, Any]


def script(seed: int) -> list[Action]:
    """What a trainer lives through: vectors, deletes, events of two partitions, odd events, steps, releases."""
    rng = np.random.default_rng(seed)
    logs = click_log(90, partitions=2, seed=seed, late_takes=5)
    actions: list[Action] = [("put_embedding", embedding(f"i{i}", i)) for i in range(35)]
    for p, events in fetches(logs, rng, most=7):
        actions += [("observe", (p, *event)) for event in events]
        odd = int(rng.integers(12))
        if odd == 0:
            actions.append(("delete_item", f"i{rng.integers(35)}"))
        elif odd == 1:
            item = int(rng.integers(40))
            actions.append(("put_embedding", embedding(f"i{item}", item + 100, content=f"new {item}")))
        elif odd == 2:
            actions.append(("forget", f"u{rng.integers(12)}"))
        actions.append(("run", None))
    for p, log in enumerate(logs):
        end = len(log)
        actions += [("broken", (p, end)), ("observe", (p, end + 1, log[-1])), ("erased", (p, end + 2))]
    return [*actions, ("finish", None), ("run", None)]


def live(trainer: OnlineTrainer, actions: list[Action]) -> list[tuple[str, ...]]:
    """Lives through the actions; returns what each candidate was trained on, and its weights."""
    released = []
    for name, value in actions:
        match name:
            case "put_embedding" | "delete_item" | "forget":
                getattr(trainer, name)(value)
            case "observe":
                trainer.intake.observe(*value)
            case "broken":
                trainer.intake.observe_broken(*value)
            case "erased":
                trainer.intake.observe_erased(*value)
            case "finish":
                trainer.intake.finish()
            case "run":
                # a vector that never comes is given up at once: when that is depends on the script alone
                missing = trainer.intake.advance(timed_out=trainer.intake.advance())
                while not missing and trainer.step() is not None:
                    if trainer.release_due():
                        released.append(told(trainer))
                    missing = trainer.intake.advance()
                    missing = trainer.intake.advance(timed_out=missing)
                trainer.progress.drain_scores()
        assert is_balanced(trainer.intake.counts)
    return released


def told(trainer: OnlineTrainer) -> tuple[str, ...]:
    candidate = trainer.candidate()
    trainer.begin_next()
    assert candidate.segment is not None
    weights = pack_arrays({name: tensor.numpy() for name, tensor in candidate.weights.items()})
    return (candidate.rows_sha256, candidate.segment.root, str(candidate.offsets), str(candidate.metrics), str(weights))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0, 1), min_size=1, max_size=3))
@example(seed=7274, cuts=[1.0])  # a forgotten user's event was the only one of its second
@example(seed=1471, cuts=[0.3125])  # all users with a take were forgotten
def test_a_trainer_cut_anywhere_and_restored_equals_one_that_went_on(seed: int, cuts: list[float]) -> None:
    actions = script(seed)
    whole = fresh()
    released = live(whole, actions)

    places = sorted({int(cut * (len(actions) - 2)) for cut in cuts})  # never after finish, which a restart undoes
    pieces = [actions[a:b] for a, b in zip([0, *places], [*places, len(actions)], strict=True)]
    trainer, again = fresh(), live(fresh(), [])
    for number, piece in enumerate(pieces):
        if number:
            state = trainer.snapshot()
            trainer = fresh()
            trainer.restore(through_bytes(state))
            assert_same(trainer.snapshot(), state)
        again += live(trainer, piece)
    assert again == released
    assert len(released) >= 1
    assert_same(trainer.snapshot(), whole.snapshot())
    assert trainer.intake.counts == whole.intake.counts and trainer.intake.counts.pending == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_trainer_restored_from_what_changed_between_many_snapshots_equals_one_that_went_on(
    seed: int, tmp_path: Path
) -> None:
    actions = script(seed)
    places = sorted(np.random.default_rng(seed).choice(len(actions) - 2, 6, replace=False).tolist())
    pieces = [actions[a:b] for a, b in zip([0, *places], [*places, len(actions)], strict=True)]
    whole, trainer = fresh(), fresh()
    chain = SnapshotChain(make_store(tmp_path))
    again, released = [], []
    for number, piece in enumerate(pieces):
        if number:
            if number % 3 == 2:
                trainer.state().frozen()  # one that could not be written
            meta = chain.write(trainer.state())
            state = chain.store.load(meta.snapshot_id).state
            assert_same(state, whole.snapshot())
            if number % 2:
                state, trainer = chain.load(), fresh()
                trainer.restore(state)
        again += live(trainer, piece)
        released += live(whole, piece)
    assert again == released
    assert_same(trainer.snapshot(), whole.snapshot())


def test_a_snapshot_shares_nothing_with_the_trainer_that_goes_on() -> None:
    actions = script(3)
    trainer = fresh()
    live(trainer, actions[: len(actions) // 2])
    state = trainer.snapshot()
    before = digest(state)
    live(trainer, actions[len(actions) // 2 :])
    assert digest(state) == before


def test_dropout_draws_from_the_trainer_alone_and_leaves_the_global_generator_where_it_was() -> None:
    def run(disturb: int) -> str:
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        trainer = fresh()
        live(trainer, script(5))
        assert torch.equal(torch.get_rng_state(), before)
        return told(trainer)[-1]

    assert run(1) == run(2)


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (CONFIG, {"partitions": 3, "variants": VARIANTS}),
        (CONFIG, {"partitions": 2}),
        (small_config(bank_takes=12), {"partitions": 2, "variants": VARIANTS}),
    ],
    ids=["partitions", "variants", "settings"],
)
def test_a_snapshot_of_another_trainer_is_refused(config: TrainerConfig, others: dict[str, Any]) -> None:
    trainer = fresh()
    live(trainer, script(1))
    with pytest.raises(ValueError):
        make_trainer(config, **others).restore(trainer.snapshot())


def test_a_forgotten_user_is_in_no_part_of_the_state_any_more() -> None:
    actions = script(11)
    cut = len(actions) * 2 // 3
    trainer = fresh()
    live(trainer, [action for action in actions[:cut] if action[0] != "forget"])
    secret = next(value[2].user_id for name, value in reversed(actions[:cut]) if name == "observe")
    assert any(secret.encode() in value for value in digest(trainer.snapshot()).values())
    before = trainer.intake.counts
    erased = trainer.forget(secret)
    assert trainer.intake.counts.erased == before.erased + erased > 0 and is_balanced(trainer.intake.counts)
    state = trainer.snapshot()
    for name in [name.removesuffix(".bytes") for name in state.arrays if name.endswith(".bytes")]:
        texts = state.pieces(name)
        assert secret.encode() not in texts, name
        assert not any(f'"{secret}"'.encode() in text for text in texts), name
    live(trainer, actions[cut:])
    assert trainer.intake.counts.pending == 0


def test_after_a_restore_an_idle_partition_is_waited_for_until_it_is_said_again() -> None:
    trainer = make_trainer(partitions=2)
    for second in range(0, 400, 20):
        trainer.intake.observe(0, second, behaviour(f"x{second}", second=second))
    trainer.intake.window.idle([1])
    trainer.intake.advance()
    again = make_trainer(partitions=2)
    again.restore(trainer.snapshot())
    assert again.intake.observe(1, 0, behaviour("early", user="u2", second=100)) is ObserveResult.LATE
    pending = again.intake.pending
    again.intake.advance()
    assert again.intake.pending == pending  # partition 1 never spoke in time: nothing is released without asking again
    again.intake.window.idle([1])
    pump(again)
    assert again.intake.counts.trained == trainer.intake.counts.trained or again.intake.counts.trained > 0
