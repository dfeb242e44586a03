"""Inference of CiUBM: candidates and a history to probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import Misconfigured
from schemas.manifests import ModelManifest
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.collate import dense_features
from trainer.networks.config import CiUBMConfig
from trainer.networks.item_rows import ItemRows


class Scorer:
    """A released model for inference; immutable and thread-safe."""

    def __init__(self, model: CiUBM, manifest: ModelManifest, *, history_length: int) -> None:
        self.manifest = manifest
        self._model = model.eval()
        self._history_length = history_length

    @classmethod
    def from_release(cls, weights: Mapping[str, Tensor], manifest: ModelManifest) -> Scorer:
        """Build from a release. Raises `Misconfigured` if the weights are not this version's CiUBM."""
        try:
            config = CiUBMConfig.model_validate(manifest.config["model"])
            model = CiUBM(config, vector_width=manifest.dim, seed=0)
            model.load_state_dict(dict(weights))
            history_length = int(str(manifest.config["history_length"]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise Misconfigured(
                f"release {manifest.release_id} was made by another version of mimstream and cannot be served; train "
                f"again, or serve with the version that made it: {error}"
            ) from error
        return cls(model, manifest, history_length=history_length)

    @property
    def history_length(self) -> int:
        """How many of a user's newest takes are used."""
        return self._history_length

    def score(self, items: ItemRows, candidates: int) -> NDArray[np.float64]:
        """Probability that the user takes each of the first `candidates` of the items, shape (candidates,).

        The other items are the user's history, oldest first, with a trigger item last. The user's side is encoded once
        for all candidates.
        """
        return self.probabilities(self.prepare(items, candidates))

    def prepare(self, items: ItemRows, candidates: int) -> CtrBatch:
        """The request as tensors: one row per candidate, and one history, shared by all."""
        last = len(items.item_ids)
        taken = min(last - candidates, self._history_length)
        history_L = torch.arange(last, last - taken, -1) if taken else torch.zeros(1, dtype=torch.int64)
        dense_BF = dense_features(np.full(candidates, taken), items.has_vector_U[1 : candidates + 1])
        return CtrBatch(
            hashes_U2=torch.from_numpy(items.hashes_U2),
            vectors_UV=torch.from_numpy(items.vectors_UV),
            has_vector_U=torch.from_numpy(items.has_vector_U),
            target_B=torch.arange(1, candidates + 1),
            history_BL=history_L[None],
            dense_BF=torch.from_numpy(dense_BF),
        )

    def probabilities(self, batch: CtrBatch) -> NDArray[np.float64]:
        """The forward pass alone."""
        with torch.inference_mode():
            return torch.sigmoid(self._model(batch).double()).numpy()
