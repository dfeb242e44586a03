"""CiUBM on recorded impressions, the same class as online, and its ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from trainer.networks.ciubm import CiUBM
from trainer.networks.config import CiUBMConfig
from trainer.offline.neural.base import SIMILARITIES, TRIALS, NeuralModel


class Ciubm(NeuralModel):
    """CiUBM. `switches` override all other settings; an ablation turns parts off."""

    name = "ciubm"
    trials: Sequence[Mapping[str, Any]] = TRIALS
    switches: Mapping[str, Any] = {}

    @override
    def build(self, settings: Mapping[str, Any], *, vector_width: int, dense_width: int, seed: int) -> CiUBM:
        config = CiUBMConfig(**{**settings, **self.switches})
        return CiUBM(config, vector_width=vector_width, dense_width=dense_width, seed=seed)


_NO_SIMILARITIES: Mapping[str, Any] = {
    "similarity_features": False,
    "bilinear_interest": False,
    "content_in_attention": False,
}


class WithoutIds(Ciubm):
    """No table of ids: content, similarities and numbers alone."""

    name = "ciubm-without-ids"
    switches: Mapping[str, Any] = {"target_id": False, "id_interest": False, "fusion_interest": False}


class WithoutContent(Ciubm):
    """No part that reads vectors and no similarity columns: a DIN with CiUBM's head."""

    name = "ciubm-without-content"
    left_out = SIMILARITIES
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
    left_out = SIMILARITIES
    switches: Mapping[str, Any] = _NO_SIMILARITIES


class PlainHead(Ciubm):
    """The interests under layers without crosses."""

    name = "ciubm-plain-head"
    switches: Mapping[str, Any] = {"cross_layers": 0}
