from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.networks.id_table import IdTable
from trainer.samples.id_hashes import hash_columns, id_hashes


def hashes(*names: str) -> torch.Tensor:
    return torch.tensor([id_hashes(name) for name in names], dtype=torch.int64).reshape(-1, 2)


def table(capacity: int = 64, *, admit_after: int = 2, width: int = 4) -> IdTable:
    torch.manual_seed(0)
    return IdTable(capacity, width, admit_after=admit_after)


def test_an_id_gets_its_own_row_when_it_was_named_often_enough_and_not_before() -> None:
    known = table(admit_after=3)
    for times in (1, 2):
        assert not len(known.admit(hashes("a")))
        assert known.rows(hashes("a")).tolist() == [0], times
    changed = known.admit(hashes("a"))
    assert changed.tolist() == known.rows(hashes("a")).tolist() != [0]
    assert known.admitted == 1


def test_admission_changes_no_score_and_rows_then_go_their_own_way() -> None:
    known = table(admit_after=1)
    before = known(hashes("a", "b")).detach()
    known.admit(hashes("a", "b"))
    assert torch.equal(known(hashes("a", "b")), before)
    with torch.no_grad():
        known.embedding.weight[known.rows(hashes("a"))] += 1
    assert torch.equal(known(hashes("b", "unseen")), before)
    assert not torch.equal(known(hashes("a")), before[:1])


def test_memory_stays_bounded_and_newer_ids_replace_those_not_named_for_longest() -> None:
    known = table(capacity=32, admit_after=1)
    size = sum(tensor.numel() for tensor in known.state_dict().values())
    names = [f"i{n}" for n in range(1000)]
    for name in names:
        known.admit(hashes("regular", name))
    assert sum(tensor.numel() for tensor in known.state_dict().values()) == size
    assert known.admitted <= 32
    alive = [name for name, row in zip(names, known.rows(hashes(*names)).tolist(), strict=True) if row]
    assert "regular" not in alive and known.rows(hashes("regular")).item() > 0, "named all along, never evicted"
    assert min(int(name[1:]) for name in alive) > 900, "only the newest are left"


def test_an_id_named_in_the_same_batch_is_never_evicted_for_another() -> None:
    known = table(capacity=8, admit_after=1)  # one set of eight
    first = hashes(*(f"a{n}" for n in range(8)))
    known.admit(first)
    assert known.admitted == 8
    known.admit(torch.cat([first, hashes("late")]))
    assert (known.rows(first) > 0).all() and known.rows(hashes("late")).item() == 0


def test_no_two_ids_ever_share_a_row_of_their_own() -> None:
    known, rng = table(capacity=64, admit_after=1), np.random.default_rng(1)
    for _ in range(200):
        names = [f"i{n}" for n in rng.choice(300, size=20, replace=False)]
        known.admit(hashes(*names))
        rows = known.rows(hashes(*(f"i{n}" for n in range(300))))
        owned = rows[rows > 0]
        assert len(owned.unique()) == len(owned) == known.admitted


def test_a_rare_id_among_many_others_is_not_admitted_for_their_sake() -> None:
    known = table(capacity=512, admit_after=3)
    for n in range(1500):
        known.admit(hashes(f"once{n}"))
    assert known.admitted < 15, "a few collide in the sketch, most do not"


def test_an_id_named_twice_in_one_batch_counts_once_and_gets_one_row() -> None:
    known = table(1024)
    names = [str(one) for one in range(12)]
    twice = hashes(*names, *reversed(names))
    assert not len(known.admit(twice))
    changed = known.admit(twice)
    assert len(changed) == known.admitted == len(set(known.rows(hashes(*names)).tolist()) - {0})
    rows = known.rows(twice)
    assert rows.max() <= 1024 and torch.equal(rows[:12], rows[12:].flip(0))


def test_padding_is_nobody() -> None:
    known = table(admit_after=1)
    known.admit(torch.zeros(3, 2, dtype=torch.int64))
    assert known.admitted == 0


def test_same_ids_same_table_and_a_snapshot_goes_on_where_it_was() -> None:
    rng = np.random.default_rng(2)
    calls = [hashes(*(f"i{n}" for n in rng.choice(90, size=12, replace=False))) for _ in range(60)]
    straight, again, resumed = table(), table(), table()
    for call in calls:
        straight.admit(call)
        again.admit(call)
    for call in calls[:30]:
        resumed.admit(call)
    other = table()
    other.load_state_dict(resumed.state_dict())
    for call in calls[30:]:
        other.admit(call)
    for found in (again, other):
        for name, value in straight.state_dict().items():
            assert torch.equal(value, found.state_dict()[name]), name


def test_only_the_rows_of_a_batch_get_a_gradient() -> None:
    known = table(admit_after=1)
    known.admit(hashes("a", "b"))
    known(hashes("a", "unseen")).sum().backward()
    gradient = known.embedding.weight.grad
    assert gradient is not None
    touched = sorted(gradient.coalesce().indices()[0].tolist())
    assert touched == sorted([0, int(known.rows(hashes("a")))])


def test_a_capacity_that_does_not_fill_its_sets_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        IdTable(30, 4, admit_after=1)


def test_hashes_of_many_ids_are_those_of_each() -> None:
    names = ["", "a", "ß", "item-17"]
    assert hash_columns(names).tolist() == [list(id_hashes(name)) for name in names]
    assert hash_columns([]).shape == (0, 2)
