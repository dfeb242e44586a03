"""Item vectors of the click models: encoders trained on data before the rows they encode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.features import ItemFeatures
from encoders.fusion import ItemFusion
from encoders.fusion_config import FusionConfig
from encoders.similarity import unit_or_zero_rows
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.csft.pretrain import pretrain
from trainer.csft.run import learn, padded
from trainer.datasets.queries import Queries
from trainer.datasets.spans import Span, photo_name
from trainer.offline.encoder_report import frozen_vectors
from trainer.offline.protocols import Protocol
from trainer.samples.numbering import FeatureNumbers

VectorKind = Literal[
    "csft", "pretrained", "frozen", "shuffled", "stale", "text", "image",
    "missing-10", "missing-30", "missing-50", "missing-70",
]  # fmt: skip
VECTOR_KINDS: tuple[VectorKind, ...] = get_args(VectorKind)
REFRESH_EPOCHS = 2
"""Passes over all pairs so far when an encoder is warm-started from the one before."""
FOR_CLICK_MODELS = {"log_q_strength": 0.0, "temperature": 0.25, "learn_temperature": False}
"""Settings of C-SFT for vectors of a click model, which models popularity itself and uses the whole range of
similarities rather than the nearest few. Chosen on validation spans, where a learned temperature, the memory bank and
logQ .5 were no better. What the user set wins."""
WIDE_HEADS = {"text_rank": 384, "image_rank": 512}
"""Such encoders use more of the towers' principal components. Chosen in the same way."""


def for_click_models(csft: CsftConfig, shape: FusionConfig) -> tuple[CsftConfig, FusionConfig]:
    """These settings with the choices for click models wherever nothing was set."""
    chosen = {name: value for name, value in FOR_CLICK_MODELS.items() if name not in csft.model_fields_set}
    wide = {name: value for name, value in WIDE_HEADS.items() if name not in shape.model_fields_set}
    return csft.model_copy(update=chosen), shape.model_copy(update=wide)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Unit rows per encoder version and number of an item or query; row 0 is padding."""

    vectors_EIV: NDArray[np.float32]
    has_vector_EI: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class EncoderVersions:
    """Trains the encoder versions of a folder under a protocol."""

    protocol: Protocol
    features: ItemFeatures
    """Of the items, then of the queries."""
    numbers: FeatureNumbers
    """Of the items alone."""
    csft: CsftConfig
    shape: FusionConfig
    pretrain: PretrainConfig
    queries: Queries | None = None
    """What is searched in the folder; None where it is not read."""

    def vectors(self, kind: VectorKind, seed: int) -> Vectors:
        """Train encoders of a `kind` and embed all items and queries once per version.

        csft: C-SFT, warm-started for each later version. pretrained: image-title alignment only. frozen: plain tower
        features. shuffled: the vectors of csft, permuted over the items. stale: the first version for all rows. text,
        image: csft with one modality of items alone. missing-P: csft where P % of the items with both modalities lack
        one of them, drawn anew for each seed.

        C-SFT learns from searches too, and asks as a server does: with the view of their words or photo. Otherwise
        queries are embedded as items are, and shuffled among themselves.
        """
        items = self.numbers.known
        features = _without_sides(self.features.select(np.arange(items)), kind, seed)
        if self.queries is not None:
            searched = self.features.select(np.arange(items, len(self.features)))
            features = ItemFeatures.concatenate([features, searched])
        has = np.concatenate([[False], features.has_text_N | features.has_image_N])
        stops = self.protocol.encoder_stops if kind != "stale" else self.protocol.encoder_stops[:1]
        if kind == "frozen":
            known = self._known(stops[0])
            found = [reduced(frozen_vectors(features, centred_by_N=known[1:]), known, self.shape.width)] * len(stops)
        elif kind == "pretrained":
            found = [self._pretrained(features, seed)] * len(stops)
        else:
            found = self._csft(features, stops, seed)
        found += found[-1:] * (len(self.protocol.encoder_stops) - len(found))
        vectors = np.stack(found) * has[:, None]
        if kind == "shuffled":
            rng = np.random.default_rng([seed, 31])
            behind = 1 + items
            other = np.concatenate([[0], 1 + rng.permutation(items), behind + rng.permutation(len(has) - behind)])
            vectors, has = vectors[:, other], has[other]
        return Vectors(vectors.astype(np.float32), np.broadcast_to(has, vectors.shape[:2]).copy())

    def _known(self, stop: int) -> NDArray[np.bool_]:
        """Per number: an item that was published before; no query is."""
        return self._of_items(self.protocol.log.published(Span(0, stop)))

    def _of_items(self, flag_I: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.concatenate([flag_I, np.zeros(len(self.features) + 1 - len(flag_I), bool)])

    def _fresh(self, features: ItemFeatures, seed: int) -> ItemFusion:
        torch.manual_seed(seed)
        _, shape = for_click_models(self.csft, self.shape)
        fusion = ItemFusion(shape, text_width=features.text_NT.shape[1], image_width=features.image_NI.shape[1])
        fusion.fit(features.select(np.flatnonzero(self._known(self.protocol.encoder_stops[0])[1:])))
        return fusion

    def _pretrained(self, features: ItemFeatures, seed: int) -> NDArray[np.float32]:
        fusion = self._fresh(features, seed)
        before = features.select(np.flatnonzero(self._known(self.protocol.encoder_stops[0])[1:]))
        pretrain(self.pretrain.model_copy(update={"seed": seed}), fusion, padded(fusion, before))
        return np.asarray(fusion.embed(padded(fusion, features)).fused_ND.numpy(), np.float32)

    def _csft(self, features: ItemFeatures, stops: tuple[int, ...], seed: int) -> list[NDArray[np.float32]]:
        log = self.protocol.log
        fusion = self._fresh(features, seed)
        asked = _Asked.of(self.queries, self.protocol, self.numbers, features)
        items = padded(fusion, asked.features)
        start = self.protocol.encode.start
        csft, _ = for_click_models(self.csft, self.shape)
        pairs = log.pairs(
            Span(start, stops[-1]),
            asked.numbers,
            history_length=self.csft.history_length,
            seed=0,
            queries=asked.known,
        )
        behind = np.zeros(len(asked.features) - len(features), bool)
        count, first_query = len(features) + 1, self.numbers.known + 1
        found = []
        for version, stop in enumerate(stops):
            epochs = REFRESH_EPOCHS if version else self.csft.epochs
            config = csft.model_copy(update={"seed": seed + 1_000 * version, "epochs": epochs})
            seen = [pair for pair in pairs if pair.row.second < stop]
            learn(
                config,
                fusion,
                items,
                asked.numbers,
                seen,
                usable=np.concatenate([self._known(stop) & ~self._of_items(log.held_out), behind]),
            )
            views = fusion.embed(items)
            rows = np.asarray(views.fused_ND.numpy()[:count], np.float32)
            if self.csft.anchor_view == "fused":
                of_queries = (views.image_ND + views.title_ND)[first_query:count].numpy()
                rows = np.concatenate([rows[:first_query], unit_or_zero_rows(of_queries)])
            found.append(rows)
        return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """Items and queries for C-SFT, whose anchors are either words or a photo.

    A query of both is an anchor without the one and another without the other, behind all.
    """

    features: ItemFeatures
    numbers: FeatureNumbers
    known: dict[str | bytes, int]
    """Number of each anchor, as `BehaviourLog.queries_taken` names them."""

    @staticmethod
    def of(queries: Queries | None, protocol: Protocol, numbers: FeatureNumbers, features: ItemFeatures) -> _Asked:
        data = protocol.log.data
        if queries is None or data.searches is None:
            return _Asked(features, numbers, {})
        both = np.flatnonzero(features.has_text_N & features.has_image_N)
        both = both[both >= queries.items]
        words, photos = (_with_sides(features.select(both), text=one, image=not one) for one in (True, False))
        of_words = {int(row) + 1: len(features) + 1 + place for place, row in enumerate(both)}
        of_photo = {number: anchor + len(both) for number, anchor in of_words.items()}
        known: dict[str | bytes, int] = {}
        for place, number in enumerate(queries.number_P[:-1].tolist()):
            if not number:
                continue
            text = data.searches.text(place)
            if text is not None and features.has_text_N[number - 1]:
                known[text] = of_words.get(number, number)
            if features.has_image_N[number - 1]:
                known[photo_name(place)] = of_photo.get(number, number)
        names = [
            *data.item_ids,
            *queries.names,
            *(f"{queries.names[row - queries.items]}\0{side}" for side in "wp" for row in both),
        ]
        contents = [*(numbers.content(item + 1) for item in range(numbers.known)), *names[numbers.known :]]
        return _Asked(ItemFeatures.concatenate([features, words, photos]), FeatureNumbers(names, contents), known)


def reduced(vectors_ND: NDArray[np.float32], fitted_on_N: NDArray[np.bool_], width: int) -> NDArray[np.float32]:
    """Unit rows on their leading principal components, fitted on these rows; zero rows stay zero."""
    if vectors_ND.shape[1] <= width:
        return vectors_ND
    sample = vectors_ND[fitted_on_N].astype(np.float64)
    _, axes = np.linalg.eigh(sample.T @ sample)
    turned = vectors_ND @ axes[:, ::-1][:, :width]
    return unit_or_zero_rows(turned)


def _without_sides(features: ItemFeatures, kind: VectorKind, seed: int) -> ItemFeatures:
    text_N, image_N = features.has_text_N.copy(), features.has_image_N.copy()
    if kind == "text":
        image_N[:] = False
    elif kind == "image":
        text_N[:] = False
    elif kind.startswith("missing-"):
        rng = np.random.default_rng([seed, 33])
        missing_N = (rng.random(len(features)) < int(kind.removeprefix("missing-")) / 100) & text_N & image_N
        is_text_N = rng.random(len(features)) < 0.5
        text_N &= ~(missing_N & is_text_N)
        image_N &= ~(missing_N & ~is_text_N)
    return _with_sides(features, text=text_N, image=image_N)


def _with_sides(
    features: ItemFeatures, *, text: NDArray[np.bool_] | bool, image: NDArray[np.bool_] | bool
) -> ItemFeatures:
    """The same items without the sides that are not to be seen."""
    text_N, image_N = features.has_text_N & text, features.has_image_N & image
    return replace(
        features,
        text_NT=features.text_NT * text_N[:, None],
        image_NI=features.image_NI * image_N[:, None],
        has_text_N=text_N,
        has_image_N=image_N,
    )
