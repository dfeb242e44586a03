"""Data-parallel workers: each computes its share of the rows, all of them get all rows, and gradients flow back.

Every worker plans the same batch (ids are cheap), so only vectors and gradients are exchanged, and the loss of two
workers is the loss of one with the same batch up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """Rank of this worker and number of workers; `Workers()` is a single one."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> Workers:
        """From torch.distributed (gloo or nccl); a single worker where it is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return Workers(dist.get_rank(), dist.get_world_size())
        return Workers()

    def share_of(self, rows: int) -> slice:
        """The rows, out of `rows`, of this worker; shares differ by one row at most."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """(rows, ...) rows of all workers in order, from each one's `share_of(rows)`; gradients flow back to all."""
        if self.count == 1:
            return own
        gathered: Tensor = _Gather.apply(own, self, rows)
        return gathered

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up every parameter's gradient over the workers."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # every worker must join every all_reduce
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def sum_number(self, value: float) -> float:
        """Add up a number over the workers."""
        if self.count == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.cuda()
        dist.all_reduce(total)
        return float(total)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, workers: Workers, rows: int) -> Tensor:
        ctx.workers, ctx.rows = workers, rows
        # shares may differ by a row and all_gather needs equal ones: each worker adds its own to a sum of zeros
        whole = own.new_zeros((rows, *own.shape[1:]))
        whole[workers.share_of(rows)] = own
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total[ctx.workers.share_of(ctx.rows)], None, None
