"""Adam for a table of which each step changes a few rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Optimizer):
    """`torch.optim.SparseAdam`, quicker for gradients that contain each row once, except row 0, which may occur often.

    An embedding over distinct ids has such gradients: the ids without a row share row 0 (`IdTable`). Their rows are not
    merged, the dearest part of a step. Gradients of an id that occurs twice (under two encoder versions) are summed
    first. The update is the same: moments of other rows do not change, and the bias correction counts steps of the
    whole table. State: `exp_avg` and `exp_avg_sq`, shaped like the table.

    Source: Adam (arXiv 1412.6980).
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of the rows that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group)

    def _update(self, table: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
        state["step"] += 1
        assert table.grad is not None
        rows_U, gradient_UE = table.grad._indices()[0], table.grad._values()
        ordered_U = rows_U.sort().values
        if ((ordered_U[1:] == ordered_U[:-1]) & (ordered_U[1:] > 0)).any():
            merged = table.grad.coalesce()
            rows_U, gradient_UE = merged.indices()[0], merged.values()
        shared_U = rows_U == 0
        # every entry of row 0 holds the sum of all of them, so all write the same values
        gradient_UE = torch.where(shared_U[:, None], shared_U.to(gradient_UE.dtype) @ gradient_UE, gradient_UE)
        first, second = group["betas"]
        mean_UE = state["exp_avg"].index_select(0, rows_U).lerp_(gradient_UE, 1 - first)
        square_UE = state["exp_avg_sq"].index_select(0, rows_U).mul_(second)
        square_UE.addcmul_(gradient_UE, gradient_UE, value=1 - second)
        state["exp_avg"].index_copy_(0, rows_U, mean_UE)
        state["exp_avg_sq"].index_copy_(0, rows_U, square_UE)
        size = group["lr"] * (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        moved_UE = table.index_select(0, rows_U).addcdiv_(mean_UE, square_UE.sqrt_().add_(group["eps"]), value=-size)
        table.index_copy_(0, rows_U, moved_UE)
