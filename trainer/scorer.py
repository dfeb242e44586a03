"""Serving side of CiUBM: ids, vectors and a history in, probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import Misconfigured
from schemas.manifests import ModelManifest
from trainer.batches import dense_features, newest_first
from trainer.ciubm import CiUBM, CtrBatch
from trainer.config import CiUBMConfig
from trainer.item_rows import ItemRows

Vectors = Mapping[str, NDArray[np.float32]]


class Scorer:
    """A released model, ready to answer; immutable, safe to call from several threads."""

    def __init__(self, model: CiUBM, manifest: ModelManifest, *, history_length: int) -> None:
        self.manifest = manifest
        self._model = model.eval()
        self._history_length = history_length

    @classmethod
    def from_release(cls, weights: Mapping[str, Tensor], manifest: ModelManifest) -> Scorer:
        """Build from what the model store holds. Raises `Misconfigured` if the weights are not this version's CiUBM."""
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
        """How many of a user's newest takes take part."""
        return self._history_length

    def score(
        self, history: Sequence[str], candidates: Sequence[str], vectors: Vectors, *, trigger_item: str | None = None
    ) -> NDArray[np.float64]:
        """Probability that the user takes each candidate, shape (len(candidates),).

        `history` is oldest first; `vectors` holds unit vectors of whatever items have one. The user's side is encoded
        once for all candidates.
        """
        return self.probabilities(self.prepare(history, candidates, vectors, trigger_item=trigger_item))

    def prepare(
        self, history: Sequence[str], candidates: Sequence[str], vectors: Vectors, *, trigger_item: str | None = None
    ) -> CtrBatch:
        """The same request as tensors: one row per candidate, and the history, which all share, once."""
        past = [*history, *([trigger_item] if trigger_item else [])][-self._history_length :]
        items = (
            vectors if isinstance(vectors, ItemRows) else ItemRows.of([*past, *candidates], vectors, self.manifest.dim)
        )
        place = items.place
        targets_B = np.fromiter(map(place.__getitem__, candidates), np.int64, len(candidates))
        history_1L = newest_first([[place[item] for item in past]], self._history_length)
        lengths_B = np.full(len(candidates), len(past))
        return CtrBatch(
            hashes_U2=torch.from_numpy(items.hashes_U2),
            vectors_UV=torch.from_numpy(items.vectors_UV),
            has_vector_U=torch.from_numpy(items.has_vector_U),
            target_B=torch.from_numpy(targets_B),
            history_BL=torch.from_numpy(history_1L),
            dense_BF=torch.from_numpy(dense_features(lengths_B, items.has_vector_U[targets_B])),
        )

    def probabilities(self, batch: CtrBatch) -> NDArray[np.float64]:
        """The forward pass alone."""
        with torch.inference_mode():
            return torch.sigmoid(self._model(batch).double()).numpy()
