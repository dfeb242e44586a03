"""How towers compute: in what precision, and how their input gets to the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from encoders.config import Precision

ALIKE_ROWS = 16
"""With fewer rows than these, matrix products on a CPU round a row otherwise than among many. From here on, in a pass
on one thread, a row comes out the same, bit by bit, whatever is beside it."""

_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def computing(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Inside, matrix products and convolutions are computed in `precision`; sums and norms stay in fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_REDUCED[precision])


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU from pinned memory, so that the copy runs beside what is computed there."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
