from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.networks.row_adam import RowAdam

ONCE = [[0, 3, 5, 0, 0], [1, 5], [0, 0], [7], [5, 3, 0]]
MANY_TIMES = [[3, 5, 0, 3, 0], [5, 5], [1, 7, 7, 7], [3, 0], [8, 8, 5]]


@pytest.mark.parametrize("batches", [ONCE, MANY_TIMES], ids=["the shared row many times", "any row many times"])
def test_it_does_what_torchs_sparse_adam_does(batches: list[list[int]]) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4, sparse=True)
    theirs.load_state_dict(ours.state_dict())
    optimisers = RowAdam([ours.weight], lr=0.1), torch.optim.SparseAdam([theirs.weight], lr=0.1)
    for rows in batches:
        places, wanted = torch.tensor(rows), torch.randn(len(rows), 4)
        for table, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            ((table(places) - wanted) ** 2).sum().backward()
            optimiser.step()
        torch.testing.assert_close(ours.weight, theirs.weight)
    for name in ("exp_avg", "exp_avg_sq"):
        found, expected = (one.state[table.weight][name] for one, table in zip(optimisers, (ours, theirs), strict=True))
        torch.testing.assert_close(found, expected)


def test_a_table_without_a_gradient_stands_still() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    before = table.weight.detach().clone()
    RowAdam([table.weight], lr=1.0).step()
    assert torch.equal(table.weight, before)
