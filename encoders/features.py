"""Frozen features of items with their publish-time attributes, the input of the trained heads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.attributes import MOST_WORDS, Attribute, words_of

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
    words_NA: NDArray[np.int64]
    """Hashes of the values of further attributes, A of them; -1 pads."""

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
    categories: Sequence[str | None],
    years: Sequence[float | None],
    prices: Sequence[float | None],
    words: Sequence[Sequence[int]],
) -> dict[str, NDArray[Any]]:
    """The attribute columns of `ItemFeatures`; `words` are those of `word_hashes`."""
    hashed = {name: category_hashes(name) for name in set(categories)}
    words_NA = np.full((len(words), MOST_WORDS), -1, np.int64)
    for row, own in enumerate(words):
        words_NA[row, : len(own)] = own
    return {
        "category_N2": np.array([hashed[name] for name in categories], np.int64).reshape(-1, 2),
        "year_N": np.array([UNKNOWN if year is None else year for year in years], np.float32),
        "price_N": np.array([UNKNOWN if price is None else price for price in prices], np.float32),
        "words_NA": words_NA,
    }


def word_hashes(attributes: Mapping[str, Attribute]) -> tuple[int, ...]:
    """A stable 31-bit hash of each value of an attribute that is words, as `words_of` lists them."""
    return tuple(_hashes(f"{name}\0{value}")[0] for name, value in words_of(attributes))


def category_hashes(category: str | None) -> tuple[int, int]:
    """Two stable 31-bit hashes of a category, case-insensitive; (-1, -1) for none."""
    name = (category or "").strip().lower()
    if not name:
        return -1, -1
    return _hashes(name)


def _hashes(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little") >> 1, int.from_bytes(digest[4:], "little") >> 1
