"""Arrays as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
    """Arrays as safetensors: equal arrays give equal bytes."""
    import numpy as np
    import safetensors.numpy

    packed: bytes = safetensors.numpy.save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})
    return packed


def unpack_arrays(packed: bytes) -> dict[str, Any]:
    """What `pack_arrays` was given. Raises `ValueError` for other bytes."""
    import safetensors.numpy

    try:
        arrays: dict[str, Any] = safetensors.numpy.load(packed)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"not arrays: {error!r}") from None
    return arrays
