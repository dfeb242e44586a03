"""Pairs of a data-set folder: those of the learning span teach, the later spans judge the encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from encoders.fusion import ItemFusion, Views
from encoders.similarity import unit_or_zero_rows
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
from streams.encoder_training.csft import PairData
from streams.encoder_training.pair_report import pair_report
from streams.encoder_training.queries import items_and_queries
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import AnchorKind, NoPair
from trainer.csft.trainer import CsftReport
from trainer.datasets.spans import BehaviourLog, Span
from trainer.offline import encoder_report


def folder_pairs(
    log: BehaviourLog,
    builder: BundleBuilder,
    config: CsftConfig,
    *,
    with_test: bool,
    outcomes: Container[str] = (),
) -> PairData:
    """Compute the features, without attributes that are `outcomes`, and mine the pairs; `with_test` reports the test
    span too.
    """
    both = items_and_queries(list(contents_of(log.data, outcomes=outcomes)), log.queries_taken(), builder.features)
    features = both.features.select(np.arange(both.items))
    numbered = slice(0, both.items + 1)
    no_pair: Counter[NoPair] = Counter()
    mined = partial(
        log.pairs, numbers=both.numbers, history_length=config.history_length, seed=config.seed, queries=both.known
    )
    pairs = mined(log.learn, no_pair=no_pair)
    known = log.published(log.learn)
    usable = both.is_item
    usable[numbered] &= known & ~log.held_out
    spans = {"validation": log.validation} | ({"test": log.test} if with_test else {})

    def report(span: Span, fusion: ItemFusion, views: Views, last: CsftReport | None) -> dict[str, Any]:
        searched = {}
        if both.known:
            asked = [pair for pair in mined(span, held_out=True) if pair.anchor_kind is not AnchorKind.TRIGGER_ITEM]
            searched = pair_report(pairs, asked, both.items, both.features, views, anchor_view=config.anchor_view)
        views = Views(*(view[numbered] for view in (views.image_ND, views.title_ND, views.fused_ND)))
        fused = views.fused_ND.numpy()
        questions = encoder_report.questions_of(log, span)
        geometry = encoder_report.geometry_of(views, questions)
        found = {
            "popularity": encoder_report.popularity(log, span, questions),
            "frozen": encoder_report.recalls(encoder_report.frozen_vectors(features), log, span, questions),
            "trained": encoder_report.recalls(fused, log, span, questions),
            "geometry": asdict(geometry),
        }
        for vectors in ("popularity", "frozen", "trained"):
            found[vectors] |= searched.get(vectors, {})
        if last is not None:
            found["trained_with_popularity"] = encoder_report.recalls_with_popularity(
                fused, log, span, questions, temperature=last.temperature, strength=config.log_q_strength
            )
        for width in fusion.config.nested_widths[:1]:
            prefix = unit_or_zero_rows(fused[:, :width])
            found["trained_nested"] = encoder_report.recalls(prefix, log, span, questions)
        return found

    return PairData(
        name=log.data.name,
        source=log.data.name,
        contents=both.contents,
        features=both.features,
        fit_features=features.select(np.flatnonzero(known[1:])),
        numbers=both.numbers,
        usable=usable,
        pairs=pairs,
        learned=pairs,
        reports=lambda *trained: {name: report(span, *trained) for name, span in spans.items()},
        provenance={
            "first_event_at": datetime.fromtimestamp(log.learn.start, UTC),
            "last_event_at": datetime.fromtimestamp(log.learn.stop - 1, UTC),
        },
        counts={
            "no_pair": {reason.value: no_pair[reason] for reason in NoPair},
            "anchors": {kind.value: sum(pair.anchor_kind is kind for pair in pairs) for kind in AnchorKind},
            "unreadable_queries": both.unreadable,
            "rows_without_user": log.data.without_user,
        },
    )
