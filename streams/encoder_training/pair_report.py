"""How an encoder does on pairs that it has not learned: recall for each kind of anchor, and geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from encoders.features import ItemFeatures
from encoders.fusion import Views
from trainer.csft import health
from trainer.csft.pairs import AnchorKind, Pair
from trainer.offline import encoder_report

ANCHORS = 10
"""Newest items of a pair's anchor that ask a question."""
_FIRST = (1, 5)
"""Who searches looks at the first answers."""
_NAMES = {
    AnchorKind.TRIGGER_ITEM: "next",
    AnchorKind.QUERY_IMAGE: "query_image",
    AnchorKind.QUERY_TEXT: "query_text",
}


def pair_report(
    learned: Sequence[Pair],
    held_back: Sequence[Pair],
    items: int,
    features: ItemFeatures,
    views: Views,
    *,
    anchor_view: Literal["fused", "same"],
) -> dict[str, Any]:
    """Recall at 50 of what was taken, of searches at 1 and 5 too, by kind of anchor, and geometry.

    `items` of the features are items, whose numbers begin at 1, and the others are queries, which no question finds.
    A query asks with the view that it was trained with (`CsftConfig.anchor_view`).
    """
    numbers = slice(0, items + 1)
    fused, frozen = views.fused_ND.numpy(), encoder_report.frozen_vectors(features)
    of_view = [fused] * 3 if anchor_view == "same" else [views.image_ND.numpy(), views.title_ND.numpy(), fused]
    cold = np.ones(items + 1, bool)
    cold[[0, *{pair.row.item for pair in learned}]] = False
    taken = np.bincount([pair.row.item for pair in learned], minlength=items + 1)
    found: dict[str, Any] = {"geometry": asdict(health.geometry(fused[1 : items + 1]))}
    for kind, name in _NAMES.items():
        asking = [pair for pair in held_back if pair.anchor_kind is kind]
        if not asking:
            continue
        questions = health.Questions.of(
            [
                # what was taken before is no answer
                (pair.anchor[-ANCHORS:][::-1], pair.row.item, {n for n in pair.row.history if n <= items})
                for pair in asking
            ],
            width=ANCHORS,
        )
        depths = {name: encoder_report.K}
        if kind is not AnchorKind.TRIGGER_ITEM:
            depths |= {f"{name}_at_{k}": k for k in _FIRST}
        for vectors, anchors, answers in (("frozen", frozen, frozen), ("trained", of_view[asking[0].view], fused)):
            queries = health.queries(anchors, questions)
            for entry, k in depths.items():
                recall = health.recall_at_k(queries, answers[numbers], questions, cold, k=k)
                found.setdefault(vectors, {})[entry] = recall.as_dict()
        popular = health.popularity_recall(taken, questions, cold, k=encoder_report.K)
        found.setdefault("popularity", {})[name] = popular.as_dict()
    return found
