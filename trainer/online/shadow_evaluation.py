"""Shadow evaluation: a candidate and the serving release score the same rows, and neither learns from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from schemas.errors import Misconfigured
from schemas.manifests import ModelManifest
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.config import CiUBMConfig
from trainer.online.gate import NO_ROWS, ComparedRows
from trainer.samples.rows import Impression
from trainer.state import State, whole_numbers

Release: TypeAlias = "tuple[Mapping[str, Tensor], ModelManifest]"

_COLUMNS = ("label", "retaken", "candidate", "serving")


class ShadowEvaluation:
    """Scores batches with the weights of two releases until it has seen `rows_needed` rows.

    Rows are trained in the order of their seconds, so what a release learned from ends at its `last_event_at`; only
    rows later than those of both count. Nothing here draws random numbers or changes what training does.

    A snapshot holds the scores and the ids of the two releases, not their weights: to restore it, build the evaluation
    from the same two releases.
    """

    def __init__(self, candidate: Release, serving: Release, *, rows_needed: int) -> None:
        """Raises `Misconfigured` if this version cannot build one of the two."""
        self.candidate = candidate[1]
        self.against = serving[1].release_id
        self._models = _built(candidate), _built(serving)
        ends = [manifest.last_event_at for _, manifest in (candidate, serving)]
        self._learned_until = max((int(end.timestamp()) for end in ends if end is not None), default=-1)
        self._rows_needed = rows_needed
        self._tables: deque[ComparedRows] = deque()

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        """Score a batch, unless enough was scored."""
        unseen_B = np.array([row.second > self._learned_until for row in rows])
        if self.complete or not unseen_B.any():
            return
        with torch.inference_mode():
            candidate_B, serving_B = (torch.sigmoid(model(batch).double()).numpy() for model in self._models)
        self._tables.append(
            ComparedRows(
                user=np.array([row.user_id for row in rows])[unseen_B],
                label=np.array([row.label for row in rows], np.int64)[unseen_B],
                retaken=np.array([row.retaken for row in rows])[unseen_B],
                candidate=candidate_B[unseen_B],
                serving=serving_B[unseen_B],
            )
        )

    @property
    def complete(self) -> bool:
        """Whether it can be decided."""
        return sum(map(len, self._tables)) >= self._rows_needed

    @property
    def compared(self) -> ComparedRows:
        """All rows that both scored."""
        if not self._tables:
            return NO_ROWS
        return ComparedRows(
            **{name: np.concatenate([getattr(table, name) for table in self._tables]) for name in ("user", *_COLUMNS)}
        )

    def forget(self, user_id: str) -> None:
        """Remove a user's rows; as many others are scored instead."""
        kept = ((table, table.user != user_id) for table in self._tables)
        columns = ("user", *_COLUMNS)
        tables = (ComparedRows(**{name: getattr(table, name)[chosen] for name in columns}) for table, chosen in kept)
        self._tables = deque(table for table in tables if len(table))

    def snapshot(self) -> State:
        """The scores so far, and the ids of the two releases."""
        rows = self.compared
        state = State(
            {"lengths": whole_numbers(map(len, self._tables))},
            {"release_id": self.candidate.release_id, "against": self.against},
        )
        state.put_texts("user", rows.user.tolist())
        for name in _COLUMNS:
            state.arrays[name] = getattr(rows, name)
        return state

    def restore(self, state: State) -> None:
        """Continue with the scores of `snapshot`. Raises `ValueError` if they are of other releases."""
        of = (state.values["release_id"], state.values["against"])
        if of != (ours := (self.candidate.release_id, self.against)):
            raise ValueError(f"scores of {of[0]} beside {of[1]}, not of {ours[0]} beside {ours[1]}")
        columns = {name: state.arrays[name] for name in _COLUMNS} | {"user": np.array(state.texts("user"), np.str_)}
        ends = np.cumsum(state.arrays["lengths"]).tolist()
        self._tables = deque(
            ComparedRows(**{name: column[start:end].copy() for name, column in columns.items()})
            for start, end in zip([0, *ends[:-1]], ends, strict=False)
        )


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold anything but finite numbers."""
    return [
        name
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]


def _built(release: Release) -> CiUBM:
    weights, manifest = release
    try:
        model = CiUBM(CiUBMConfig.model_validate(manifest.config["model"]), vector_width=manifest.dim, seed=0)
        model.load_state_dict(dict(weights))
    except (KeyError, ValueError, RuntimeError) as error:
        raise Misconfigured(f"release {manifest.release_id} cannot be scored by this version: {error}") from error
    return model.eval()
