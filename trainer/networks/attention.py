"""DIN's target attention over a history, with its gradient by hand.

Source: Deep Interest Network (arXiv 1706.06978). Letters as in `trainer.networks.ciubm`; H width of the hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class TargetAttention(nn.Module):
    """DIN's attention unit: a weight for each history item from [h, t, h - t, h * t] and extra scalars, not normalised.

    The first layer is linear in h, so each row has one matrix, made from its target, that maps h to the hidden layer;
    the terms of the target alone are added once per row.
    """

    def __init__(self, width: int, extra: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(4 * width + extra, hidden)
        self.activation = nn.PReLU()
        self.second = nn.Linear(hidden, 1)

    def forward(
        self, history_BL: Tensor, history_BLE: Tensor, target_BE: Tensor, extra: Sequence[Tensor] = ()
    ) -> Tensor:
        """Weights, shape (B, L); 0 at padding. `extra`: further scalars of each pair, shape (B, L) each.

        A single history, of shape (1, L) and (1, L, E), is shared by all B targets.
        """
        of_item_HE, of_target_HE, of_difference_HE, of_product_HE, of_extra_HX = torch.tensor_split(
            self.first.weight, [n * self.width for n in (1, 2, 3, 4)], dim=1
        )
        matrix_BEH = torch.addcmul((of_item_HE + of_difference_HE).T, target_BE[:, :, None], of_product_HE.T)
        offset_BH = F.linear(target_BE, of_target_HE - of_difference_HE, self.first.bias)
        history_BLE = history_BLE.expand(len(target_BE), -1, -1)
        if extra:
            history_BLE = torch.cat([history_BLE, torch.stack(list(extra), dim=-1)], dim=-1)
            matrix_BEH = torch.cat([matrix_BEH, of_extra_HX.T.expand(len(matrix_BEH), -1, -1)], dim=1)
        weight_BL: Tensor = _Scores.apply(
            history_BLE, matrix_BEH, offset_BH, self.activation.weight, self.second.weight[0]
        )
        return (weight_BL + self.second.bias) * (history_BL > 0)


class _Scores(torch.autograd.Function):
    """prelu(h M + o) . w for each pair of history item and row, shape (B, L).

    PReLU is a x + (1 - a) relu(x), and only the relu part needs the hidden layer of every pair, the largest tensor of
    the network: it is stored once, and read three times for the gradient. Autograd would store it twice, and write a
    gradient of its size for each of the steps, that of the slope `a` among them.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, history_BLE: Tensor, matrix_BEH: Tensor, offset_BH: Tensor, slope_1: Tensor, weight_H: Tensor
    ) -> Tensor:
        hidden_BLH = torch.baddbmm(offset_BH[:, None], history_BLE, matrix_BEH).relu_()
        rectified_BL = hidden_BLH @ weight_H
        linear_BL = ((matrix_BEH @ weight_H)[:, None] @ history_BLE.transpose(1, 2)).squeeze(1)
        linear_BL += (offset_BH @ weight_H)[:, None]
        ctx.save_for_backward(
            history_BLE, matrix_BEH, offset_BH, slope_1, weight_H, hidden_BLH, linear_BL - rectified_BL
        )
        return rectified_BL.lerp(linear_BL, slope_1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    @once_differentiable
    def backward(ctx: Any, grad_BL: Tensor) -> tuple[Tensor, ...]:
        history_BLE, matrix_BEH, offset_BH, slope_1, weight_H, hidden_BLH, negative_BL = ctx.saved_tensors
        grad_BL = grad_BL.contiguous()
        # the pair's gradient where the hidden unit is positive
        active_BLH = torch.ops.aten.threshold_backward(grad_BL[:, :, None].expand_as(hidden_BLH), hidden_BLH, 0)
        rest_1 = 1 - slope_1
        of_matrix_BEH = torch.addcmul(
            slope_1 * (grad_BL[:, None] @ history_BLE).transpose(1, 2), rest_1, history_BLE.transpose(1, 2) @ active_BLH
        )
        of_offset_BH = rest_1 * active_BLH.sum(1) + slope_1 * grad_BL.sum(1, keepdim=True)
        weighted_BEH = matrix_BEH * weight_H
        of_history_BLE = torch.baddbmm(
            grad_BL[:, :, None] * (slope_1 * weighted_BEH.sum(2))[:, None],
            active_BLH,
            (rest_1 * weighted_BEH).transpose(1, 2),
        )
        of_weight_H = (matrix_BEH * of_matrix_BEH).sum((0, 1)) + (offset_BH * of_offset_BH).sum(0)
        of_slope_1 = (grad_BL * negative_BL).sum().reshape(1)
        return of_history_BLE, of_matrix_BEH * weight_H, of_offset_BH * weight_H, of_slope_1, of_weight_H
