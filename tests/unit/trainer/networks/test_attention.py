from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.networks.attention import TargetAttention


def plain(unit: TargetAttention, history: Tensor, mask: Tensor, target: Tensor, extra: list[Tensor]) -> Tensor:
    """The unit as the paper writes it."""
    t = target[:, None].expand_as(history)
    given = torch.cat([history, t, history - t, history * t, *(each[:, :, None] for each in extra)], dim=-1)
    weights: Tensor = unit.second(unit.activation(unit.first(given))).squeeze(-1) * mask
    return weights


@pytest.mark.parametrize("extras", [0, 2])
def test_weights_and_every_gradient_are_those_of_the_plain_unit(extras: int) -> None:
    torch.manual_seed(0)
    unit = TargetAttention(5, extras, 7).double()
    torch.nn.init.constant_(unit.activation.weight, -0.4)
    history, target = torch.randn(6, 4, 5).double(), torch.randn(6, 5).double()
    extra = [torch.randn(6, 4).double() for _ in range(extras)]
    places = torch.randint(0, 3, (6, 4))
    assert 0 < (places > 0).float().mean() < 1
    wanted = torch.randn(6, 4).double()
    inputs = [history, target, *extra]
    found = []
    for each in (lambda: unit(places, history, target, extra), lambda: plain(unit, history, places > 0, target, extra)):
        for one in [*inputs, *unit.parameters()]:
            one.requires_grad_().grad = None
        weights = each()
        (weights * wanted).sum().backward()
        found.append([weights, *(one.grad for one in [*inputs, *unit.parameters()])])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_history_that_needs_no_gradient_is_allowed() -> None:
    unit = TargetAttention(5, 0, 7)
    unit(torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 3, 5), torch.randn(2, 5)).sum().backward()
    assert unit.first.weight.grad is not None
