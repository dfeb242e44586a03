"""Impressions to tensors: each distinct item of a batch has one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.negatives.sampler import ContrastivePlan
from trainer.networks.ciubm import DENSE_FEATURES, CtrBatch
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression


@dataclass(frozen=True)
class ContrastiveBatch:
    """The contrastive term of a batch: rows of the batch's distinct items instead of item numbers."""

    rows_P: Tensor
    positives_P: Tensor
    candidates_K: Tensor
    allowed_PK: Tensor
    positive_log_q_P: Tensor
    candidate_log_q_K: Tensor


@dataclass(frozen=True)
class Collated:
    """A batch of impressions as tensors, with the item numbers of its distinct items."""

    batch: CtrBatch
    labels_B: Tensor
    contrastive: ContrastiveBatch | None
    items_U: NDArray[np.int64]
    weights_B: Tensor | None = None
    """Weight of each row in the click loss; None where all weigh 1. A correction of the kind alone weighs 0, because
    its impression was learned as taken before."""


def dense_features(history_lengths: NDArray[np.int64], target_has_vector: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The context features, shape (n, DENSE_FEATURES); one definition for training and serving."""
    features_BF = np.empty((len(history_lengths), DENSE_FEATURES), np.float32)
    features_BF[:, 0] = np.log1p(history_lengths)
    features_BF[:, 1] = history_lengths > 0
    features_BF[:, 2] = target_has_vector
    return features_BF


def newest_first(histories: Sequence[Sequence[int]], length: int) -> NDArray[np.int64]:
    """Histories (oldest first) as one array, newest first, 0-padded, shape (n, longest of them, at most `length`)."""
    width = max(1, min(length, max((len(history) for history in histories), default=0)))
    padded = np.zeros((len(histories), width), np.int64)
    for i, history in enumerate(histories):
        recent = history[-width:]
        padded[i, : len(recent)] = recent[::-1]
    return padded


def collate(
    rows: Sequence[Impression], plan: ContrastivePlan | None, catalogue: Catalogue, *, history_length: int
) -> Collated:
    """Rows and plan as tensors."""
    targets_B = np.fromiter((row.item for row in rows), np.int64, len(rows))
    history_BL = newest_first([row.history for row in rows], history_length)
    numbers = [np.zeros(1, np.int64), targets_B, history_BL.ravel()]
    if plan is not None:
        numbers += [plan.positives, plan.candidates]
    distinct_U, places = np.unique(np.concatenate(numbers), return_inverse=True)
    places = places.reshape(-1)
    b, h = 1 + len(targets_B), 1 + len(targets_B) + history_BL.size
    batch = CtrBatch(
        hashes_U2=torch.from_numpy(catalogue.hashes(distinct_U)),
        vectors_UV=torch.from_numpy(catalogue.vectors(distinct_U)),
        has_vector_U=torch.from_numpy(catalogue.vector_mask(distinct_U)),
        target_B=torch.from_numpy(places[1:b]),
        history_BL=torch.from_numpy(places[b:h].reshape(history_BL.shape)),
        dense_BF=torch.from_numpy(dense_features((history_BL > 0).sum(1), catalogue.vector_mask(targets_B))),
    )
    labels_B = torch.tensor([row.label for row in rows], dtype=torch.float32)
    upgrades = [row.upgrade for row in rows]
    weights_B = 1.0 - torch.tensor(upgrades, dtype=torch.float32) if any(upgrades) else None
    if plan is None:
        return Collated(batch, labels_B, None, distinct_U, weights_B)
    p = h + len(plan.positives)
    contrastive = ContrastiveBatch(
        rows_P=torch.from_numpy(plan.rows),
        positives_P=torch.from_numpy(places[h:p]),
        candidates_K=torch.from_numpy(places[p:]),
        allowed_PK=torch.from_numpy(plan.allowed),
        positive_log_q_P=torch.from_numpy(plan.positive_log_q),
        candidate_log_q_K=torch.from_numpy(plan.log_q),
    )
    return Collated(batch, labels_B, contrastive, distinct_U, weights_B)
