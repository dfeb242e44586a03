"""What is taken after a search, and right after an item: counted in steps, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.factories.feature_world import PlainFeatures, Row, Take, World, columns_of, features_of, random_takes
from tests.factories.feeding import through_bytes
from trainer.features.config import FeatureConfig
from trainer.features.probe import differing, probe
from trainer.features.state import FeatureState
from trainer.features.state_records import StateCopies, StateWriter

CONFIG = FeatureConfig(attributes=("genres", "colour"), history_length=8, queries=True)
PLAIN = FeatureConfig(attributes=("genres", "colour"), history_length=8)
ITEMS, QUERIES = 30, 4
NAMES = tuple(f"{one} {what}" for one in ("query", "trigger") for what in ("together", "share", "lift"))
COLUMNS = [CONFIG.names.index(name) for name in NAMES]


def world_of(config: FeatureConfig = CONFIG) -> World:
    """Names beyond the items are those of searches; nothing is known of them."""
    return World(config, ITEMS + QUERIES)


def searched_takes(count: int = 300) -> list[Take]:
    rng = np.random.default_rng(3)
    takes = random_takes(count, users=15, items=ITEMS, seconds=900, seed=2)
    asked = [
        replace(take, query=int(ITEMS + rng.integers(1, QUERIES + 1)) * bool(rng.random() < 0.7)) for take in takes
    ]
    return [replace(take, trigger=int(rng.integers(1, 6)) * bool(rng.random() < 0.6)) for take in asked]


def fed(config: FeatureConfig, takes: list[Take], *, step: int = 20) -> FeatureState:
    state = FeatureState(config, world_of(config))
    for start in range(0, len(takes), step):
        part = takes[start : start + step]
        state.add(columns_of(part), before=part[-1].second + 1)
    return state


def rows_of(takes: list[Take]) -> list[Row]:
    rng = np.random.default_rng(4)
    rows = []
    for n in range(200):
        source = takes[rng.integers(len(takes))]
        drawn = n % 3 == 0
        target = source.item if drawn else int(rng.integers(1, ITEMS + 1))
        query = source.query if n % 6 == 0 else int(ITEMS + rng.integers(0, QUERIES + 1)) % (ITEMS + QUERIES + 1)
        query = query if query > ITEMS else 0
        newest = source.trigger or 1 if n % 2 else int(rng.integers(1, 6))
        rows.append(Row(target, [newest, 7], [5, 4], 1_000, (source.event, source.second) if drawn else (0, 0), query))
    return rows


def test_counts_after_a_search_equal_loops_and_leave_out_the_source_of_a_drawn_row() -> None:
    takes = searched_takes()
    rows, state = rows_of(takes), fed(CONFIG, takes)
    found = features_of(state, rows)[:, COLUMNS]
    plain = PlainFeatures(world_of(), takes)
    announced = {take.event for take in takes if take.announces}
    for row, values in zip(rows, found, strict=True):
        if row.source[0] in announced:
            row = replace(row, source=(0, 0))  # it was not counted, so there is nothing to leave out
        expected = plain.row(row)
        assert values == pytest.approx([expected[name] for name in NAMES], abs=2e-3)
    drawn_from_same = [
        row for row in rows if row.source[0] and row.query == next(t.query for t in takes if t.event == row.source[0])
    ]
    assert len([row for row in drawn_from_same if row.query]) > 10
    assert (found[:, 0] > 0).sum() > 50 and not found[[n for n, row in enumerate(rows) if not row.query], :3].any()
    assert (found[:, 3] > 0).sum() > 50
    of_trigger = {take.event: take.trigger for take in takes}
    assert len([row for row in rows if row.source[0] and of_trigger[row.source[0]] == row.history[0]]) > 10


def test_searches_change_no_other_feature_and_no_pair_of_items() -> None:
    takes = searched_takes()
    rows = rows_of(takes)
    with_queries = features_of(fed(CONFIG, takes), rows)
    plain = [replace(take, query=0, trigger=0) for take in takes]
    without = features_of(fed(PLAIN, plain), [replace(row, query=0) for row in rows])
    kept = [place for place in range(len(CONFIG.names)) if place not in COLUMNS]
    np.testing.assert_array_equal(with_queries[:, kept], without)


def test_a_state_goes_on_after_a_restart_and_servers_count_the_same() -> None:
    takes = searched_takes()
    whole, half = fed(CONFIG, takes), fed(CONFIG, takes[:140])
    restored = FeatureState(CONFIG, world_of())
    restored.restore(through_bytes(half.snapshot()))
    for start in range(140, len(takes), 20):
        part = takes[start : start + 20]
        restored.add(columns_of(part), before=part[-1].second + 1)
    rows = rows_of(takes)
    np.testing.assert_array_equal(features_of(restored, rows), features_of(whole, rows))
    whole.changed_keys = set()
    copies, writer = StateCopies(CONFIG), StateWriter(CONFIG, log="log")
    write = writer.next(whole, most=10_000)
    assert write is not None
    for key, value in write.records:
        copies.apply(key, value)
    world = world_of()
    numbers = np.arange(ITEMS + QUERIES + 1)
    theirs, ours = copies.states(world.hashes(numbers), world.facts(numbers)), whole.states(numbers)
    assert theirs.takes.takes_U[ITEMS + 1 :].all()
    assert ours.triggered is not None and ours.triggered.takes_U.astype(bool).tolist() == [0 < n < 6 for n in numbers]
    for one, other in ((theirs.takes, ours.takes), (theirs.triggered, ours.triggered)):
        for name, column in vars(other).items():
            np.testing.assert_array_equal(getattr(one, name), column)


def test_a_state_that_is_kept_keeps_what_was_taken_after_triggers() -> None:
    takes, world, numbers = searched_takes(), world_of(), np.arange(ITEMS + 1)
    state = fed(CONFIG, takes[:100])
    then = state.states(numbers).triggered
    state.hold()
    state.add(columns_of(takes[100:]), before=takes[-1].second + 1)
    kept, now = (
        state.held_states(world.hashes(numbers), world.facts(numbers)).triggered,
        state.states(numbers).triggered,
    )
    assert then is not None and kept is not None and now is not None
    assert then.takes_U.tolist() == kept.takes_U.tolist() != now.takes_U.tolist()
    np.testing.assert_array_equal(kept.together_UP, then.together_UP)


def test_a_deleted_item_is_no_trigger_any_more() -> None:
    state = fed(CONFIG, searched_takes())
    row = Row(target=8, history=[3], seconds=[5], now=1_000)
    before = features_of(state, [row])[0, CONFIG.names.index("trigger share")]
    state.delete("i3")
    after = features_of(state, [row])[0, CONFIG.names.index("trigger share")]
    assert before > 0 and after == 0


def test_a_snapshot_of_before_searches_names_none() -> None:
    takes = [replace(take, query=0, trigger=0) for take in searched_takes()]
    state = fed(PLAIN, takes).snapshot()
    del state.part("users").arrays["sources.query"], state.part("users").arrays["sources.trigger"]
    restored = FeatureState(PLAIN, world_of(PLAIN))
    restored.restore(through_bytes(state))
    np.testing.assert_array_equal(features_of(restored, rows_of(takes)), features_of(fed(PLAIN, takes), rows_of(takes)))


def test_the_probe_of_a_release_notices_another_count_of_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = probe(CONFIG)
    assert CONFIG.version != PLAIN.version and not differing(CONFIG, ours)
    assert np.array(ours).reshape(-1, len(CONFIG.names))[:, COLUMNS].any(axis=0).all()
    monkeypatch.setattr("trainer.features.columns.np.log1p", lambda values: np.log(values + 1.5))
    assert "query together" in differing(CONFIG, ours)
