"""CiUBM on recorded impressions, the same class as online, and its ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from trainer.networks.ciubm import CiUBM
from trainer.networks.config import CiUBMConfig, TreesConfig
from trainer.networks.trees import fit_trees
from trainer.offline.neural.base import SIMILARITIES, TRIALS, NeuralModel
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.fitting import FitReport, FitSettings


class Ciubm(NeuralModel):
    """CiUBM. `switches` override all other settings; an ablation turns parts off."""

    name = "ciubm"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    left_out: tuple[str, ...] = ("cosine", "target ")
    """Columns that are not among those of the stream; the network counts its own cosines."""
    switches: Mapping[str, Any] = {}

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> CiUBM:
        config = CiUBMConfig(**{**settings, **self.switches})
        return CiUBM(config, vector_width=vector_width, dense_width=dense_width, seed=seed)

    @override
    def learn(
        self, train: ColumnBatches, validation: ColumnBatches | None, settings: FitSettings, *, seed: int
    ) -> FitReport:
        report = super().learn(train, validation, settings, seed=seed)
        assert isinstance(self.network, CiUBM)
        add_trees(self.network, train, seed=seed)
        return report


@torch.inference_mode()
def add_trees(network: CiUBM, train: ColumnBatches, *, seed: int, batch_rows: int = 512) -> None:
    """Fit the trees on the newest training rows, as a stream does on the newest that it learned from."""
    config = network.config.trees
    if not config.count:
        return
    seconds_N = train.data.rows.second_N
    newest_W = np.argsort(seconds_N, kind="stable")[-config.rows :]
    numbers_NX = np.empty((len(train), network.numbers_width), np.float32)
    for rows in train.in_order(batch_rows, newest_W):
        numbers_NX[rows] = network.numbers(train.batch(rows)).numpy()
    label_W = train.data.rows.label_N[newest_W].astype(np.float32)
    forest = fit_trees(config, numbers_NX[newest_W], label_W, seed=seed)
    if forest is not None:
        network.trees.load(forest, config.share)


_NO_SIMILARITIES: Mapping[str, Any] = {
    "similarity_features": False,
    "bilinear_interest": False,
    "content_in_attention": False,
    "raw_similarities": False,
}


class WithoutIds(Ciubm):
    """No table of ids: content, similarities and numbers alone."""

    name = "ciubm-without-ids"
    switches: Mapping[str, Any] = {"target_id": False, "id_interest": False, "fusion_interest": False}


class WithoutContent(Ciubm):
    """No part that reads vectors and no similarity columns: a DIN with CiUBM's head."""

    name = "ciubm-without-content"
    left_out = (*Ciubm.left_out, *SIMILARITIES)
    switches: Mapping[str, Any] = {
        **_NO_SIMILARITIES,
        "content_interest": False,
        "fusion_interest": False,
        "target_content": False,
    }


class WithoutFusion(Ciubm):
    """No similarity-weighted ids."""

    name = "ciubm-without-fusion"
    switches: Mapping[str, Any] = {"fusion_interest": False}


class WithoutSimilarities(Ciubm):
    """Content as vectors only: no histogram, no summaries, no similarity columns, none inside the attention."""

    name = "ciubm-without-similarities"
    left_out = (*Ciubm.left_out, *SIMILARITIES)
    switches: Mapping[str, Any] = _NO_SIMILARITIES


class PlainHead(Ciubm):
    """The interests under layers without crosses."""

    name = "ciubm-plain-head"
    switches: Mapping[str, Any] = {"cross_layers": 0}


class WithoutTrees(Ciubm):
    """The network alone."""

    name = "ciubm-without-trees"
    switches: Mapping[str, Any] = {"trees": TreesConfig(count=0)}
