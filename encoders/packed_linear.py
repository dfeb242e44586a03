"""Products with weights that a CPU reads in the order in which it needs them.

A short text is a handful of rows, and its pass spends its time on reading weights: laid out for oneDNN, whose kernels
torch ships, they take about half of it, and a long pass gains a seventh. A row of such a product is also the same, to
the last bit, whatever rows are beside it, where the library behind `torch.nn.functional.linear` rounds few rows in
another way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedLinear:
    """`F.linear` by the names of the weights, with copies of them that are made at their first use and kept.

    Weights that training moves, other devices, other precisions, and builds of torch without oneDNN use `F.linear`.
    """

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, Tensor]] = {}
        self._can_pack = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    def __call__(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """inputs @ weight.T + bias; `name` stands for one weight at a time."""
        plain = (
            weight.requires_grad
            or weight.device.type != "cpu"
            or inputs.dtype != torch.float32
            or weight.dtype != torch.float32
            or (torch.is_grad_enabled() and inputs.requires_grad)
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        )
        if self._can_pack and not plain:
            kept = self._packed.get(name)
            if kept is None or kept[0] is not weight:
                kept = self._pack(name, weight)
            if kept is not None:
                out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, kept[1], bias, "none", [], "")
                return out
        return F.linear(inputs, weight, bias)

    def _pack(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        except (AttributeError, RuntimeError):  # a build of torch that has it otherwise, or not at all
            self._can_pack = False
            return None
        self._packed[name] = weight, packed
        return self._packed[name]
