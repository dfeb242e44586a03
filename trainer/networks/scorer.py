"""Inference of CiUBM: candidates and a history to probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import Misconfigured
from schemas.manifests import ModelManifest
from trainer.features.columns import features
from trainer.features.config import FeatureConfig
from trainer.features.probe import differing
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.collate import dense_columns, dense_width, with_query
from trainer.networks.config import CiUBMConfig
from trainer.networks.inference import CompiledCiUBM
from trainer.networks.item_rows import ItemRows, RequestMoment
from trainer.samples.searches import query_columns, words_of_searches


def network_of(weights: Mapping[str, Tensor], manifest: ModelManifest) -> CiUBM:
    """The network of a release. Raises `KeyError`, `ValueError` or `RuntimeError` if this version cannot build it."""
    features = FeatureConfig.model_validate(manifest.config["features"])
    config = CiUBMConfig.model_validate(manifest.config["model"])
    model = CiUBM(config, vector_width=manifest.dim, seed=0, dense_width=dense_width(features))
    model.load_weights(weights)
    return model.eval()


class Scorer:
    """A released model for inference; immutable and thread-safe."""

    def __init__(self, model: CiUBM, manifest: ModelManifest, *, history_length: int, features: FeatureConfig) -> None:
        self.manifest = manifest
        self.features = features
        """The features of the moment that it reads."""
        self._model = model.eval()
        self._history_length = history_length

    @classmethod
    def from_release(cls, weights: Mapping[str, Tensor], manifest: ModelManifest) -> Scorer:
        """Build from a release. Raises `Misconfigured` if the weights are not this version's CiUBM."""
        try:
            model = network_of(weights, manifest)
            config = FeatureConfig.model_validate(manifest.config["features"])
            history_length = int(str(manifest.config["history_length"]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise Misconfigured(
                f"release {manifest.release_id} was made by another version of mimstream and cannot be served; train "
                f"again, or serve with the version that made it: {error}"
            ) from error
        if manifest.features not in (None, config.version):
            raise Misconfigured(
                f"release {manifest.release_id} reads features {manifest.features}, and this version of mimstream "
                f"computes {config.version} under its settings: serve with the version that made it, or train again"
            )
        if manifest.feature_probe is not None and (others := differing(config, manifest.feature_probe)):
            raise Misconfigured(
                f"release {manifest.release_id} learned from features that this version of mimstream has otherwise "
                f"({', '.join(others[:5])}): serve with the version that made it, or train again"
            )
        return cls(model, manifest, history_length=history_length, features=config)

    @property
    def history_length(self) -> int:
        """How many of a user's newest takes are used."""
        return self._history_length

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of takes that have outputs of their own, beside that of any take."""
        return self._model.config.kinds

    @property
    def reads_queries(self) -> bool:
        """Whether it was taught what was searched."""
        return self.features.queries

    def score(self, items: ItemRows, candidates: int, moment: RequestMoment | None = None) -> NDArray[np.float64]:
        """Probability that the user takes each of the first `candidates` of the items, shape (candidates,).

        The other items are the user's history, oldest first, with a trigger item last, and then the query, if `moment`
        says that there is one. The user's side is encoded once for all candidates. Without a `moment` nothing is known
        of the items' takes.
        """
        return self.probabilities(self.prepare(items, candidates, moment))[:, 0]

    def features_of(self, batch: CtrBatch) -> NDArray[np.float32]:
        """The features of the moment that go into the network, shape (candidates, F)."""
        return batch.dense_BF.numpy()[:, : len(self.features.names)]

    def prepare(self, items: ItemRows, candidates: int, moment: RequestMoment | None = None) -> CtrBatch:
        """The request as tensors: one row per candidate, and one history, shared by all."""
        last = len(items.item_ids)
        moment = moment or RequestMoment.unknown(self.features, items, last - candidates)
        query, searched_BQ = 0, None
        if moment.has_query:  # its row is the last
            query, last = last, last - 1
        taken = min(last - candidates, self._history_length)
        history_L = np.arange(last, last - taken, -1) if taken else np.zeros(1, np.int64)
        seconds_L = np.array(moment.history_seconds[::-1][:taken], np.int64) if taken else np.zeros(1, np.int64)
        target_B, now_B = np.arange(1, candidates + 1), np.full(candidates, moment.now)
        query_B = np.full(candidates, query)
        features_BF = features(
            self.features, moment.states, target_B, history_L[None], seconds_L[None], now_B, query_B=query_B
        )
        if self.reads_queries:
            known_B = np.full(candidates, moment.has_query)
            words_BT, title_IT = words_of_searches([moment.query_text]), moment.states.facts.title_IT
            searched_BQ = query_columns(known_B, words_BT, title_IT[target_B])
        return CtrBatch(
            hashes_U2=torch.from_numpy(items.hashes_U2),
            vectors_UV=torch.from_numpy(items.vectors_UV),
            has_vector_U=torch.from_numpy(items.has_vector_U),
            target_B=torch.from_numpy(target_B),
            history_BL=torch.from_numpy(with_query(history_L[None], np.array([query]))),
            dense_BF=torch.from_numpy(dense_columns(features_BF, items.has_vector_U[target_B], searched_BQ)),
            category_U=torch.from_numpy(moment.states.facts.category_I.astype(np.int64)),
        )

    def probabilities(self, batch: CtrBatch) -> NDArray[np.float64]:
        """The forward pass alone: whether each is taken, then the further `kinds`, shape (candidates, 1 + K). Where all
        rows share one history it runs without the interpreter.
        """
        if len(batch.history_BL) == 1:
            return self._compiled.probabilities(batch).numpy()
        with torch.inference_mode():
            return self._model.probabilities(batch).numpy()

    @cached_property
    def _compiled(self) -> CompiledCiUBM:
        return CompiledCiUBM(self._model)
