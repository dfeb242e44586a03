"""Precision of the towers, and transfer of their input to the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from encoders.config import Precision

ALIKE_ROWS = 16
"""With fewer rows, matrix products on a CPU round a row differently. From this number on, in a pass on one thread, the
result of a row is bit-identical whatever the other rows are."""

_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def computing(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context in which matrix products and convolutions use `precision`; sums and norms stay in fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_REDUCED[precision])


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU from pinned memory, so that the copy overlaps with computation."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
