"""Impressions to tensors: each distinct item of a batch has one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.behaviours import BehaviourKind
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.state import FeatureState
from trainer.negatives.sampler import ContrastivePlan
from trainer.networks.ciubm import CtrBatch
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import RELIABILITY, Impression
from trainer.samples.searches import QUERY_COLUMNS, query_columns, words_of_searches

_WORTH = 0.1, 10.0
"""Least and greatest weight of a take by its value."""


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
class KindTargets:
    """Labels of the outputs of further kinds.

    An impression is a row of each output once as it was resolved, and once more as taken in those that a late take
    reaches; in all others a correction weighs 0.
    """

    labels_BK: Tensor
    """float32: whether the row was taken in this kind or a more reliable one."""
    weights_BK: Tensor
    """float32."""

    @classmethod
    def of(cls, rows: Sequence[Impression], kinds: Sequence[str]) -> KindTargets:
        """The labels of some rows."""
        rank_1K = torch.tensor([[RELIABILITY[BehaviourKind(kind)] for kind in kinds]])
        level_B1 = torch.tensor([[row.level] for row in rows])
        before_B1 = torch.tensor([[row.level_before] for row in rows])
        first_B1 = torch.tensor([[not row.correction] for row in rows])
        labels_BK = level_B1 >= rank_1K
        new_BK = labels_BK & (before_B1 < rank_1K)
        return cls(labels_BK.float(), (first_B1 | new_BK).float())


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
    kinds: KindTargets | None = None
    """What the outputs of further kinds learn; None where there are none."""


def weighed_by_value(collated: Collated, rows: Sequence[Impression], *, usual: float, power: float) -> Collated:
    """With takes of the last output weighed by (value / `usual`) to the power of `power`; 1 where no value is known."""
    values_B = torch.tensor([row.value for row in rows], dtype=torch.float64)
    known_B = (values_B > 0) & (usual > 0)
    worth_B = torch.where(known_B, (values_B / max(usual, 1e-12)).clamp_min(1e-12) ** power, 1.0)
    worth_B = worth_B.clamp(*_WORTH).float()
    if collated.kinds is None:
        worth_B = torch.where(collated.labels_B > 0, worth_B, 1.0)
        return replace(collated, weights_B=worth_B if collated.weights_B is None else collated.weights_B * worth_B)
    kinds, weights_BK = collated.kinds, collated.kinds.weights_BK.clone()
    weights_BK[:, -1] *= torch.where(kinds.labels_BK[:, -1] > 0, worth_B, 1.0)
    return replace(collated, kinds=replace(kinds, weights_BK=weights_BK))


def dense_width(config: FeatureConfig) -> int:
    """Width of the network's dense input under these features."""
    return 1 + len(config.names) + (len(QUERY_COLUMNS) if config.queries else 0)


def dense_columns(
    features_BF: NDArray[np.float32],
    target_has_vector_B: NDArray[np.bool_],
    searched_BQ: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The network's dense input, training or serving: features of the moment, whether the target has a vector, and
    `query_columns` where searches are read.
    """
    further = () if searched_BQ is None else (searched_BQ,)
    return np.concatenate([features_BF, target_has_vector_B[:, None], *further], axis=1, dtype=np.float32)


def with_query(history_BL: NDArray[np.int64], query_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Histories, newest first, with each row's query as the newest; 0 is no query. As they are without any query."""
    has_B = query_B > 0
    if not has_B.any():
        return history_BL
    out_BL = np.zeros((len(history_BL), history_BL.shape[1] + 1), np.int64)
    out_BL[has_B, 0], out_BL[has_B, 1:] = query_B[has_B], history_BL[has_B]
    out_BL[~has_B, :-1] = history_BL[~has_B]
    return out_BL


def newest_first(histories: Sequence[Sequence[int]], length: int) -> NDArray[np.int64]:
    """Histories (oldest first) as one array, newest first, 0-padded, shape (n, longest of them, at most `length`)."""
    width = max(1, min(length, max((len(history) for history in histories), default=0)))
    padded = np.zeros((len(histories), width), np.int64)
    for i, history in enumerate(histories):
        recent = history[-width:]
        padded[i, : len(recent)] = recent[::-1]
    return padded


def collate(
    rows: Sequence[Impression],
    plan: ContrastivePlan | None,
    catalogue: Catalogue,
    *,
    history_length: int,
    moment: FeatureState | None = None,
    kinds: Sequence[str] = (),
) -> Collated:
    """Rows and plan as tensors. `moment` is the state that the rows' features are of; by default nothing was taken yet.
    `kinds` are those that have outputs of their own.

    Features that a row has already are kept, as of a correction or of a row that waited; others are noted in the row.
    """
    targets_B = np.fromiter((row.item for row in rows), np.int64, len(rows))
    history_BL = newest_first([row.history for row in rows], history_length)
    query_B = np.fromiter((row.query for row in rows), np.int64, len(rows))
    numbers = [np.zeros(1, np.int64), targets_B, history_BL.ravel(), query_B]
    if plan is not None:
        numbers += [plan.positives, plan.candidates]
    distinct_U, places = np.unique(np.concatenate(numbers), return_inverse=True)
    places = places.reshape(-1)
    b, h = 1 + len(targets_B), 1 + len(targets_B) + history_BL.size
    q = h + len(query_B)
    history_BL = places[b:h].reshape(history_BL.shape)
    moment = moment or FeatureState(FeatureConfig(), catalogue)
    features_BF = _features_of(rows, moment, distinct_U, targets_B, places[1:b], history_BL, places[h:q])
    facts = catalogue.facts(distinct_U)
    searched_BQ = None
    if moment.config.queries:
        words_BT = words_of_searches([row.query_text for row in rows])
        searched_BQ = query_columns(query_B > 0, words_BT, facts.title_IT[places[1:b]])
    batch = CtrBatch(
        hashes_U2=torch.from_numpy(catalogue.hashes(distinct_U)),
        vectors_UV=torch.from_numpy(catalogue.vectors(distinct_U)),
        has_vector_U=torch.from_numpy(catalogue.vector_mask(distinct_U)),
        target_B=torch.from_numpy(places[1:b]),
        history_BL=torch.from_numpy(with_query(history_BL, places[h:q])),
        dense_BF=torch.from_numpy(dense_columns(features_BF, catalogue.vector_mask(targets_B), searched_BQ)),
        category_U=torch.from_numpy(facts.category_I.astype(np.int64)),
    )
    labels_B = torch.tensor([row.label for row in rows], dtype=torch.float32)
    upgrades = [row.upgrade for row in rows]
    weights_B = 1.0 - torch.tensor(upgrades, dtype=torch.float32) if any(upgrades) else None
    targets = KindTargets.of(rows, kinds) if kinds else None
    if plan is None:
        return Collated(batch, labels_B, None, distinct_U, weights_B, targets)
    p = q + len(plan.positives)
    contrastive = ContrastiveBatch(
        rows_P=torch.from_numpy(plan.rows),
        positives_P=torch.from_numpy(places[q:p]),
        candidates_K=torch.from_numpy(places[p:]),
        allowed_PK=torch.from_numpy(plan.allowed),
        positive_log_q_P=torch.from_numpy(plan.positive_log_q),
        candidate_log_q_K=torch.from_numpy(plan.log_q),
    )
    return Collated(batch, labels_B, contrastive, distinct_U, weights_B, targets)


def _features_of(
    rows: Sequence[Impression],
    moment: FeatureState,
    distinct_U: NDArray[np.int64],
    targets_B: NDArray[np.int64],
    place_B: NDArray[np.int64],
    history_BL: NDArray[np.int64],
    query_B: NDArray[np.int64],
) -> NDArray[np.float32]:
    """`history_BL`, `place_B` and `query_B` index `distinct_U`."""
    made_BF = features(
        moment.config,
        moment.states(distinct_U),
        place_B,
        history_BL,
        newest_first([row.history_seconds for row in rows], history_BL.shape[1]),
        np.fromiter((row.second for row in rows), np.int64, len(rows)),
        moment.sources(
            targets_B,
            np.fromiter((row.drawn_from for row in rows), np.int64, len(rows)),
            np.fromiter((row.drawn_second for row in rows), np.int64, len(rows)),
        ),
        query_B,
    )
    for place, row in enumerate(rows):
        if not row.moment.features:
            row.moment.features = made_BF[place].tobytes()
        else:
            made_BF[place] = np.frombuffer(row.moment.features, np.float32)
    return made_BF
