"""Frozen features of items with their publish-time attributes, the input of the trained heads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNKNOWN = np.float32(np.nan)


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """N items. A missing modality is a zero row with a false flag; an unknown attribute is NaN or -1."""

    text_NT: NDArray[np.float32]
    """Features of the text tower."""
    image_NI: NDArray[np.float32]
    """Features of the image tower."""
    has_text_N: NDArray[np.bool_]
    has_image_N: NDArray[np.bool_]
    category_N2: NDArray[np.int64]
    """Two hashes of the category; -1 where there is none."""
    year_N: NDArray[np.float32]
    price_N: NDArray[np.float32]
    """Price at first publish."""

    def __len__(self) -> int:
        return len(self.has_text_N)

    def select(self, rows: NDArray[np.int64]) -> ItemFeatures:
        """These rows, in this order."""
        return ItemFeatures(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[ItemFeatures]) -> ItemFeatures:
        """Several tables as one."""
        return ItemFeatures(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(ItemFeatures)
            }
        )


def attribute_columns(
    categories: Sequence[str | None], years: Sequence[float | None], prices: Sequence[float | None]
) -> dict[str, NDArray[Any]]:
    """The attribute columns of `ItemFeatures`."""
    hashed = {name: category_hashes(name) for name in set(categories)}
    return {
        "category_N2": np.array([hashed[name] for name in categories], np.int64).reshape(-1, 2),
        "year_N": np.array([UNKNOWN if year is None else year for year in years], np.float32),
        "price_N": np.array([UNKNOWN if price is None else price for price in prices], np.float32),
    }


def category_hashes(category: str | None) -> tuple[int, int]:
    """Two stable 31-bit hashes of a category, case-insensitive; (-1, -1) for none."""
    name = (category or "").strip().lower()
    if not name:
        return -1, -1
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little") >> 1, int.from_bytes(digest[4:], "little") >> 1
