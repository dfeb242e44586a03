"""QARM of Kuaishou: content as codes, whose embeddings are trained like ids.

Source: QARM (arXiv 2411.11739). Vectors that are aligned with behaviour are quantised by residual k-means: the number
of the nearest centroid, then that of the nearest centroid of what remains, and so on. The codes of target and history
enter the click model as further item features.

Different here: codes of residual k-means alone, without those of nearest neighbours; `LEVELS` and `CENTROIDS` fit some
ten thousand items; vectors are those of the encoder under comparison. Codes keep their meaning for as long as the
codebook stands, so all rows have those of the oldest encoder version, whatever version the row's vectors are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from schemas.errors import Misconfigured
from trainer.networks.attention import TargetAttention
from trainer.networks.ciubm import CtrBatch, gathered, length_scale, weighted_sum
from trainer.offline.data import CtrData
from trainer.offline.neural.base import SIMILARITIES, TRIALS, NeuralModel
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.din import ATTENTION_HIDDEN, DEFAULT_SHAPE, ID_WIDTH, PeerNetwork, Shape

LEVELS, CENTROIDS = 4, 128


class ResidualKMeans:
    """Codebooks of residual k-means, one per level."""

    def __init__(self, vectors_NV: NDArray[np.float32], *, seed: int) -> None:
        """Fit on these vectors. Raises `Misconfigured` without scikit-learn."""
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError:
            raise Misconfigured("model 'qarm' needs scikit-learn: pip install scikit-learn") from None
        self._books: list[NDArray[np.float32]] = []
        rest_NV = vectors_NV.astype(np.float32)
        for _ in range(LEVELS):
            means = MiniBatchKMeans(min(CENTROIDS, len(rest_NV)), random_state=seed, n_init=1, batch_size=4096)
            self._books.append(means.fit(rest_NV).cluster_centers_.astype(np.float32))
            rest_NV = rest_NV - self._books[-1][_nearest(rest_NV, self._books[-1])]

    def codes(self, vectors_NV: NDArray[np.float32]) -> NDArray[np.int64]:
        """Number of the nearest centroid per level, shape (N, LEVELS)."""
        rest_NV, found = vectors_NV.astype(np.float32), []
        for book in self._books:
            found.append(_nearest(rest_NV, book))
            rest_NV = rest_NV - book[found[-1]]
        return np.stack(found, axis=1)


def _nearest(vectors_NV: NDArray[np.float32], book_CV: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.asarray(((book_CV**2).sum(1) - 2 * vectors_NV @ book_CV.T).argmin(1), np.int64)


class QarmNetwork(PeerNetwork):
    """The id model with a second, separately attended field of every item: the sum of its codes' embeddings.

    `vectors_UV` of its batches holds codes instead of vectors.
    """

    def __init__(self, *, dense_width: int, shape: Shape = DEFAULT_SHAPE) -> None:
        super().__init__(dense_width=dense_width, extra_width=2 * ID_WIDTH, shape=shape)
        self.code_table = nn.Embedding(LEVELS * CENTROIDS, ID_WIDTH)
        nn.init.normal_(self.code_table.weight, std=0.05)
        self.code_attention = TargetAttention(ID_WIDTH, 0, ATTENTION_HIDDEN)
        self.register_buffer("level_L", torch.arange(LEVELS) * CENTROIDS, persistent=False)

    level_L: Tensor

    def extras(self, batch: CtrBatch) -> list[Tensor]:
        """The target's codes, and target attention over those of the history."""
        code_UE = self.code_table(batch.vectors_UV.long() + self.level_L).sum(1) * batch.has_vector_U[:, None]
        target_BE = code_UE.index_select(0, batch.target_B)
        history_BLE = gathered(code_UE, batch.history_BL)
        weight_BL = self.code_attention(batch.history_BL, history_BLE, target_BE)
        return [target_BE, weighted_sum(weight_BL, history_BLE) * length_scale(batch.history_BL > 0)]


class Qarm(NeuralModel):
    """QARM."""

    name = "qarm"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out = SIMILARITIES

    @override
    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        items = train.items
        shown_I = np.unique(train.rows.item_N)
        shown_I = shown_I[items.has_vector_EI[0, shown_I]]
        self._books = ResidualKMeans(items.vectors_EIV[0, shown_I], seed=seed)
        super().fit(train, validation, seed=seed, trial=trial)

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> nn.Module:
        return QarmNetwork(dense_width=dense_width, shape=Shape(**settings))

    @override
    def _columns(self, data: CtrData) -> ColumnBatches:
        codes_IL = self._books.codes(data.items.vectors_EIV[0]).astype(np.float32)
        items = replace(data.items, vectors_EIV=codes_IL[None], has_vector_EI=data.items.has_vector_EI[:1])
        rows = replace(data.rows, encoder_N=np.zeros_like(data.rows.encoder_N))
        return super()._columns(replace(data, items=items, rows=rows))
