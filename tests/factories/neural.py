"""A small world for tests of neural click models: items with vectors of two versions, histories, impressions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from trainer.networks.ciubm import CtrBatch
from trainer.offline.data import CtrData, Histories, ImpressionColumns, ItemColumns
from trainer.samples.id_hashes import id_hashes

ITEMS, WIDTH, VERSIONS = 12, 8, 2


def world(
    rows: list[tuple[int, list[int]]],
    *,
    labels: list[int] | None = None,
    encoder: list[int] | None = None,
    users: list[int] | None = None,
    without_vector: tuple[int, ...] = (),
    names: tuple[str, ...] = ("takes", "age"),
) -> CtrData:
    """Impressions (item, history oldest first), one second apart."""
    rng = np.random.default_rng(7)
    vectors = rng.normal(size=(VERSIONS, ITEMS + 1, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    has = np.ones((VERSIONS, ITEMS + 1), bool)
    has[:, [0, *without_vector]] = False
    vectors *= has[:, :, None]
    items = ItemColumns(
        item_ids=["", *(f"i{n}" for n in range(1, ITEMS + 1))],
        vectors_EIV=vectors,
        has_vector_EI=has,
        hashes_I2=np.array([(0, 0), *(id_hashes(f"i{n}") for n in range(1, ITEMS + 1))], np.int64),
        category_I=np.array([0, *(n % 3 + 1 for n in range(ITEMS))]),
        attributes_IA=rng.normal(size=(ITEMS + 1, 1)).astype(np.float32),
        attribute_names=("price",),
        titles=["", *(f"red shirt number {n}" for n in range(1, ITEMS + 1))],
    )
    lengths = np.array([len(history) for _, history in rows], np.int64)
    stop = np.cumsum(lengths)
    taken = np.array([item for _, history in rows for item in history], np.int32)
    count = len(rows)
    return CtrData(
        items=items,
        histories=Histories(taken, np.zeros(len(taken), np.int64)),
        rows=ImpressionColumns(
            user_N=np.array(users if users is not None else range(count), np.int64),
            item_N=np.array([item for item, _ in rows], np.int64),
            second_N=np.arange(count, dtype=np.int64) if users is None else np.zeros(count, np.int64),
            label_N=np.array(labels if labels is not None else [0] * count, np.int8),
            retaken_N=np.zeros(count, bool),
            history_start_N=stop - lengths,
            history_stop_N=stop,
            encoder_N=np.array(encoder if encoder is not None else [0] * count, np.int64),
            dense_NF=np.random.default_rng(3).normal(size=(count, len(names))).astype(np.float32),
            dense_names=names,
        ),
    )


def random_world(count: int, *, seed: int = 0) -> CtrData:
    """Impressions whose label is whether the target is near the newest history item; both versions serve."""
    rng = np.random.default_rng(seed)
    rows = [
        (int(rng.integers(1, ITEMS + 1)), [int(i) for i in rng.integers(1, ITEMS + 1, size=rng.integers(1, 7))])
        for _ in range(count)
    ]
    vectors = world(rows).items.vectors_EIV[0]
    labels = [int(vectors[item] @ vectors[history[-1]] > 0.2) for item, history in rows]
    return world(rows, labels=labels, encoder=[n % 2 for n in range(count)])


def more_padding(batch: CtrBatch) -> CtrBatch:
    """The same batch with histories padded further."""
    return replace(batch, history_BL=torch.nn.functional.pad(batch.history_BL, (0, 3)))


class Bag(nn.Module):
    """A language model without layers: a token's state is its embedding plus the mean of the row's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.width = width
        self.words = nn.Parameter(torch.randn(30_522, width) * 0.1)

    def forward(self, token_BW: Tensor, mask_BW: Tensor) -> Tensor:
        own_BWD = self.words[token_BW]
        weight_BW1 = mask_BW[:, :, None].float()
        return own_BWD + (own_BWD * weight_BW1).sum(1, keepdim=True) / weight_BW1.sum(1, keepdim=True).clamp(min=1)
