"""Health of an embedding space: its geometry, and recall of the users' next takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.similarity import unit_or_zero_rows

RowArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Questions:
    """Q takes to be retrieved: the user's earlier takes, the item taken, and items that are no answer."""

    anchors_QL: NDArray[np.int64]
    """Item numbers, newest first, 0-padded."""
    target_Q: NDArray[np.int64]
    known_start_Q: NDArray[np.int64]
    """Start of each question's known items in `known`; one more at the end."""
    known: NDArray[np.int64]
    """Items already taken, which are no answer; all questions concatenated."""

    @staticmethod
    def of(found: Sequence[tuple[Sequence[int], int, Collection[int]]], *, width: int = 1) -> Questions:
        """From each question's anchors, target and known items; anchors are padded to `width` or the longest."""
        anchors_QL = np.zeros((len(found), max([width, *(len(anchors) for anchors, _, _ in found)])), np.int64)
        for q, (anchors, _, _) in enumerate(found):
            anchors_QL[q, : len(anchors)] = anchors
        return Questions(
            anchors_QL=anchors_QL,
            target_Q=np.array([target for _, target, _ in found], np.int64),
            known_start_Q=np.concatenate([[0], np.cumsum([len(known) for _, _, known in found])]).astype(np.int64),
            known=np.array([item for _, _, known in found for item in sorted(known)], np.int64),
        )

    def __len__(self) -> int:
        return len(self.target_Q)

    def sample(self, most: int, seed: int) -> Questions:
        """At most `most` questions, the same ones for the same seed."""
        if len(self) <= most:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))
        lengths = np.diff(self.known_start_Q)[chosen]
        places = np.concatenate([np.arange(self.known_start_Q[q], self.known_start_Q[q + 1]) for q in chosen])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return Questions(self.anchors_QL[chosen], self.target_Q[chosen], starts, self.known[places])


@dataclass(frozen=True)
class Recall:
    """Share of questions whose answer is among the k nearest. None where there is no such question."""

    k: int
    questions: int
    cold_questions: int
    all: float | None
    """Answers among all items."""
    cold: float | None
    """Cold answers among all items."""
    cold_among_cold: float | None
    """Cold answers among cold items."""

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


def queries(vectors_ND: RowArray, questions: Questions, *, decay: float = 1.0) -> RowArray:
    """(Q, D) unit mean of each question's anchors; `decay` down-weights older ones. Row 0 of the vectors is padding."""
    weights_QL = (questions.anchors_QL > 0) * decay ** np.arange(questions.anchors_QL.shape[1])
    summed = np.einsum("ql,qld->qd", weights_QL.astype(np.float32), vectors_ND[questions.anchors_QL])
    return unit_or_zero_rows(summed)


def recall_at_k(
    query_QD: RowArray, vectors_ND: RowArray, questions: Questions, cold_N: NDArray[np.bool_], *, k: int = 50
) -> Recall:
    """Recall of the next taken item by inner product. Row 0 of `vectors_ND` is padding; ties count one half."""
    everything = np.arange(len(vectors_ND)) > 0
    rank, cold_rank = np.empty(len(questions)), np.empty(len(questions))
    for start in range(0, len(questions), 1024):
        part = slice(start, min(start + 1024, len(questions)))
        scores = query_QD[part] @ vectors_ND.T
        rows = np.arange(len(scores))
        target = scores[rows, questions.target_Q[part]][:, None].copy()
        lengths = np.diff(questions.known_start_Q[part.start : part.stop + 1])
        known = questions.known[questions.known_start_Q[part.start] : questions.known_start_Q[part.stop]]
        scores[np.repeat(rows, lengths), known] = -np.inf
        better = (scores > target).astype(np.float32) + 0.5 * (scores == target)
        better[rows, questions.target_Q[part]] = 0
        rank[part] = better @ everything.astype(np.float32)
        cold_rank[part] = better @ (cold_N & everything).astype(np.float32)
    is_cold = cold_N[questions.target_Q]
    return Recall(
        k=k,
        questions=len(questions),
        cold_questions=int(is_cold.sum()),
        all=_mean(rank < k),
        cold=_mean(rank[is_cold] < k),
        cold_among_cold=_mean(cold_rank[is_cold] < k),
    )


def popularity_recall(takes_N: NDArray[np.int64], questions: Questions, cold_N: NDArray[np.bool_], *, k: int) -> Recall:
    """Recall of a ranking by recent takes, the same for all users."""
    constant_Q1 = np.ones((len(questions), 1), np.float32)
    return recall_at_k(constant_Q1, takes_N.astype(np.float32)[:, None], questions, cold_N, k=k)


def with_popularity(
    query_QD: RowArray, vectors_ND: RowArray, takes_N: NDArray[np.int64], *, temperature: float, strength: float
) -> tuple[RowArray, RowArray]:
    """Queries and vectors with one more column: their inner product is cosine / temperature + (1 - strength) log q.

    InfoNCE with the logQ correction at `strength` s learns log p(item | query) - (1 - s) log q(item); this adds the
    second term back, so that retrieval ranks by p while the vectors stay free of popularity. q is smoothed by a tenth
    of an average item's takes.
    """
    total, taken = int(takes_N.sum()), int(np.count_nonzero(takes_N))
    one = 0.1 * max(total, 1) / max(taken, 1)
    log_q = np.log((takes_N + one) / (total + one))
    column = (1 - strength) * log_q[:, None]
    ones = np.ones((len(query_QD), 1))
    return (
        np.concatenate([query_QD / temperature, ones], axis=1).astype(np.float32),
        np.concatenate([vectors_ND, column], axis=1).astype(np.float32),
    )


@dataclass(frozen=True)
class Geometry:
    """Geometry of a set of vectors without padding."""

    mean_pairwise_cosine: float
    """0 where directions cancel out, 1 where all are the same."""
    effective_rank: float
    """exp of the entropy of the spectrum: number of directions in use (Roy and Vetterli, 2007)."""
    uniformity: float
    """log of the mean Gaussian kernel over pairs, lower is more even (arXiv 2005.10242)."""
    alignment: float | None
    """Mean squared distance of query and answer, lower is closer (arXiv 2005.10242); None without questions."""
    title_finds_image: float | None
    """Share of items whose picture is among the 10 nearest of 1,000 to its title; None without both."""


def geometry(
    fused_ND: RowArray,
    *,
    title_ND: RowArray | None = None,
    image_ND: RowArray | None = None,
    query_QD: RowArray | None = None,
    answer_QD: RowArray | None = None,
    seed: int = 0,
) -> Geometry:
    """Geometry of up to 4,000 items. A zero row of title or image is a missing one."""
    rng = np.random.default_rng(seed)
    rows = fused_ND[np.sort(rng.choice(len(fused_ND), min(4_000, len(fused_ND)), replace=False))].astype(np.float64)
    n = len(rows)
    summed = rows.sum(0)
    cosine = float((summed @ summed - (rows**2).sum()) / max(1, n * (n - 1)))
    spectrum = np.linalg.eigvalsh(np.cov(rows.T)) if n > 1 else np.zeros(1)
    shares = np.maximum(spectrum, 0) / max(np.maximum(spectrum, 0).sum(), 1e-12)
    entropy = -float((shares * np.log(np.maximum(shares, 1e-12))).sum())
    left, right = rows[rng.integers(0, n, 20_000)], rows[rng.integers(0, n, 20_000)]
    uniformity = float(np.log(np.exp(-2 * ((left - right) ** 2).sum(1)).mean()))
    alignment = None
    if query_QD is not None and answer_QD is not None and len(query_QD):
        alignment = float(((query_QD.astype(np.float64) - answer_QD) ** 2).sum(1).mean())
    found = None
    if title_ND is not None and image_ND is not None:
        both = np.flatnonzero((np.abs(title_ND).sum(1) > 0) & (np.abs(image_ND).sum(1) > 0))
        if len(both) >= 20:
            both = np.sort(rng.choice(both, min(1_000, len(both)), replace=False))
            scores = title_ND[both] @ image_ND[both].T
            found = _mean((scores > np.diagonal(scores)[:, None]).sum(1) < 10)
    return Geometry(cosine, float(np.exp(entropy)), uniformity, alignment, found)


def collapse(shape: Geometry, *, loss_share: float | None, cosine_limit: float, loss_limit: float) -> str | None:
    """The reason not to release this space; None if there is none. `loss_share` is the uncorrected loss over ln(N)."""
    if not np.isfinite(shape.mean_pairwise_cosine) or shape.mean_pairwise_cosine > cosine_limit:
        return f"mean pairwise cosine is {shape.mean_pairwise_cosine:.3f}, above {cosine_limit:g}: items look alike"
    if loss_share is not None and not loss_share <= loss_limit:
        return f"the loss is {loss_share:.3f} of ln(number of candidates), above {loss_limit:g}: nothing is told apart"
    return None


def _mean(hits: NDArray[np.bool_]) -> float | None:
    return float(hits.mean()) if len(hits) else None
