"""Facets of items, such as section or genres, and how much two items share of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Facet:
    """One facet of I items: a value each, or several words each. Row 0 is padding and shares nothing."""

    value_I: NDArray[np.int64] | None
    """Number of the value, 0 unknown."""
    words_IW: NDArray[np.float32] | None
    """Unit rows over words, rare ones weigh more; zero rows where nothing is known."""

    @staticmethod
    def of_values(value_I: NDArray[np.int64]) -> Facet:
        """A facet with one value per item."""
        return Facet(value_I, None)

    @staticmethod
    def of_words(words_IW: NDArray[np.float32]) -> Facet:
        """A facet with several words per item, weighted by log(items / items with the word)."""
        weighted = words_IW * np.log(len(words_IW) / np.maximum(words_IW.sum(0), 1.0))
        length = np.linalg.norm(weighted, axis=1, keepdims=True)
        return Facet(None, (weighted / np.maximum(length, 1e-9)).astype(np.float32))

    def shared(self, one_P: NDArray[np.int64], other_P: NDArray[np.int64]) -> NDArray[np.float64]:
        """Per pair of items: 1 or 0 for the same value, the cosine of their words."""
        if self.value_I is not None:
            value_P = self.value_I[one_P]
            return np.asarray((value_P == self.value_I[other_P]) & (value_P > 0), np.float64)
        assert self.words_IW is not None
        return np.asarray(np.einsum("pw,pw->p", self.words_IW[one_P], self.words_IW[other_P]), np.float64)
