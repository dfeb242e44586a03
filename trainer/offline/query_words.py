"""An untrained baseline that scores by the words which a search and an item share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from trainer.offline.data import CtrData

_ROWS_PER_PASS = 65_536


class QueryWords:
    """Cosine of TF-IDF vectors of the query's words and of the target's title and text; 0 without a query."""

    name = "tfidf-query"
    calibrated = False
    trials: Sequence[Mapping[str, Any]] = ({},)

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """Weigh words by how many of the items that were shown have them; `seed` has no effect.

        Raises `Misconfigured` without scikit-learn, or if rows have no searches.
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise Misconfigured(f"model {self.name!r} needs scikit-learn: pip install scikit-learn") from None
        if train.rows.query_N is None:
            raise Misconfigured(
                f"model {self.name!r} scores by what was searched, and the folder says nothing of it, or --queries off "
                "leaves it out; leave the model out too"
            )
        titles = train.items.titles
        # one token pattern for all scripts, and words of a single letter count
        self._words = TfidfVectorizer(token_pattern=r"\w+")  # noqa: S106
        self._words.fit([titles[item] for item in np.unique(train.rows.item_N).tolist()])

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Cosines."""
        assert data.rows.query_N is not None, "fit first"
        vectors = self._words.transform(data.items.titles)
        scores = np.zeros(len(data))
        for start in range(0, len(data), _ROWS_PER_PASS):
            part = slice(start, start + _ROWS_PER_PASS)
            asked, shown = vectors[data.rows.query_N[part]], vectors[data.rows.item_N[part]]
            scores[part] = np.asarray(asked.multiply(shown).sum(axis=1)).reshape(-1)
        return scores
