"""Metrics of a trained encoder: recall and geometry on a folder's questions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.features import ItemFeatures
from encoders.fusion import Views
from encoders.similarity import unit_or_zero_rows
from trainer.csft import health
from trainer.datasets.spans import BehaviourLog, Span

K = 50
MOST_QUESTIONS = 6_000


def questions_of(log: BehaviourLog, span: Span, *, seed: int = 0) -> dict[str, health.Questions]:
    """The questions of a span by kind, a fixed sample of at most 6,000 of each."""
    found = {"next": log.next_questions(span).sample(MOST_QUESTIONS, seed)}
    basket = log.basket_questions(span)
    if basket is not None:
        found["basket"] = basket.sample(MOST_QUESTIONS, seed)
    return {kind: questions for kind, questions in found.items() if len(questions)}


def recalls(
    vectors_ND: NDArray[np.float32], log: BehaviourLog, span: Span, questions: dict[str, health.Questions]
) -> dict[str, dict[str, Any]]:
    """Recall at 50 per kind of question. Row 0 of the vectors is padding."""
    cold = log.cold(span)
    return {
        kind: health.recall_at_k(health.queries(vectors_ND, asked), vectors_ND, asked, cold, k=K).as_dict()
        for kind, asked in questions.items()
    }


def recalls_with_popularity(
    vectors_ND: NDArray[np.float32],
    log: BehaviourLog,
    span: Span,
    questions: dict[str, health.Questions],
    *,
    temperature: float,
    strength: float,
) -> dict[str, dict[str, Any]]:
    """Recall at 50 where retrieval adds the popularity that training removed (`health.with_popularity`)."""
    cold, takes = log.cold(span), log.recent_takes(span)
    found = {}
    for kind, asked in questions.items():
        queries = health.queries(vectors_ND, asked)
        rows = health.with_popularity(queries, vectors_ND, takes, temperature=temperature, strength=strength)
        found[kind] = health.recall_at_k(*rows, asked, cold, k=K).as_dict()
    return found


def popularity(log: BehaviourLog, span: Span, questions: dict[str, health.Questions]) -> dict[str, dict[str, Any]]:
    """Recall at 50 of a ranking by recent popularity."""
    takes, cold = log.recent_takes(span), log.cold(span)
    return {kind: health.popularity_recall(takes, asked, cold, k=K).as_dict() for kind, asked in questions.items()}


def frozen_vectors(
    features: ItemFeatures, *, text: bool = True, image: bool = True, centred_by_N: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """(N + 1, D) concatenated centred tower features, row 0 is padding: the baseline of training.

    `centred_by_N`: the items whose mean is the centre, all by default; those published later are no part of one that
    may not know them.
    """
    parts = []
    for used, rows, known in (
        (text, features.text_NT, features.has_text_N),
        (image, features.image_NI, features.has_image_N),
    ):
        if used:
            unit = unit_or_zero_rows(rows)
            among_N = known if centred_by_N is None else known & centred_by_N
            mean = unit[among_N].mean(0) if among_N.any() else 0.0
            parts.append(unit_or_zero_rows((unit - mean) * known[:, None]))
    joined = unit_or_zero_rows(np.concatenate(parts, axis=1))
    return np.concatenate([np.zeros((1, joined.shape[1]), np.float32), joined])


def geometry_of(views: Views, questions: dict[str, health.Questions]) -> health.Geometry:
    """Geometry of trained views (row 0 is padding), with the alignment of the first kind of question."""
    fused = views.fused_ND.numpy()
    asked = next(iter(questions.values()), None)
    return health.geometry(
        fused[1:],
        title_ND=views.title_ND.numpy()[1:],
        image_ND=views.image_ND.numpy()[1:],
        query_QD=None if asked is None else health.queries(fused, asked),
        answer_QD=None if asked is None else fused[asked.target_Q],
    )


def table(report: dict[str, Any]) -> str:
    """Recall rows as text."""
    lines = [f"{'recall@50':<24}{'questions':<20}{'all':>8}{'cold':>8}{'cold among cold':>17}"]
    for name in ("popularity", "frozen", "trained", "trained_nested", "trained_with_popularity"):
        for kind, row in report.get(name, {}).items():
            figures = [row["all"], row["cold"], row["cold_among_cold"]]
            shown = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
            lines.append(f"{name:<24}{kind:<20}{shown[0]:>8}{shown[1]:>8}{shown[2]:>17}")
    return "\n".join(lines)
