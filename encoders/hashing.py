"""HashingEncoder: vectors without weights, for tests only, close for common words and colours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from encoders.base import ItemContent, Prepared
from encoders.preprocess import ImageLimits, decode_image, join_text
from schemas.errors import EncodingFailed, Reason

_SIZE = 8
_COLOUR_WEIGHT = 0.5


class HashingEncoder:
    """Each word and each coarse pixel colour has a random direction by its hash; an item is their sum.

    Deterministic across machines and processes, a few microseconds per item. Text and pictures have the same checks as
    in the real encoder, so that it rejects the same input.
    """

    def __init__(
        self,
        dim: int = 32,
        *,
        limits: ImageLimits = ImageLimits(max_bytes=8_388_608, max_pixels=25_000_000),  # noqa: B008 - immutable
    ) -> None:
        self._dim = dim
        self._limits = limits

    @property
    def version(self) -> str:
        """Algorithm and width."""
        return f"hashing-{self._dim}-1"

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self._dim

    def prepare(self, content: ItemContent) -> Prepared:
        """Check, decode and hash one item. Raises `EncodingFailed` as every encoder does."""
        words = join_text(content, max_characters=2_000).lower().split()
        tokens = tuple(int.from_bytes(hashlib.sha256(word.encode()).digest()[:7]) for word in words)
        pixels = None if content.image is None else decode_image(content.image, size=_SIZE, limits=self._limits)
        if not tokens and pixels is None:
            raise EncodingFailed(Reason.NO_CONTENT, f"item {content.item_id!r} has neither text nor picture")
        return Prepared(tokens=tokens or None, pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows in the order of `batch`."""
        out = np.empty((len(batch), self._dim), dtype=np.float32)
        for row, item in enumerate(batch):
            parts = []
            if item.tokens is not None:
                parts.append(_unit(sum(self._direction(token) for token in item.tokens)))
            if item.pixels is not None:
                # 4 levels per channel: 64 colours, each with its own direction
                codes = (item.pixels.reshape(-1, 3) // 64).astype(np.int64) @ np.array([16, 4, 1])
                colours = sum(self._direction(-1 - int(code)) for code in codes)
                parts.append(_COLOUR_WEIGHT * _unit(colours))
            out[row] = _unit(sum(parts))
        return out

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """As items: nothing was learned from queries."""
        return self.encode(batch)

    def _direction(self, seed: int) -> NDArray[np.float64]:
        blocks = (4 * self._dim + 63) // 64
        raw = b"".join(hashlib.sha512(f"{seed}:{block}".encode()).digest() for block in range(blocks))
        return np.frombuffer(raw[: 4 * self._dim], dtype="<u4") / 2**31 - 1.0


def _unit(vector: NDArray[np.float64] | float) -> NDArray[np.float64]:
    vector = np.asarray(vector, dtype=np.float64)
    unit: NDArray[np.float64] = vector / np.linalg.norm(vector)
    return unit
