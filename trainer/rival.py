"""The release that answers, frozen, beside the model that learns: both score the same rows before either learns."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import Misconfigured
from schemas.manifests import ModelManifest
from trainer.ciubm import CiUBM, CtrBatch
from trainer.config import CiUBMConfig
from trainer.gate import NO_ROWS, ComparedRows
from trainer.impressions import Impression
from trainer.state import State, whole_numbers


class Rival:
    """Scores each batch with a release's weights and keeps the newest scores of both sides.

    Rows are trained in the order of their seconds, so what the release learned from ends at its `last_event_at`; only
    later rows count. Nothing here draws random numbers or changes what training does.

    `compared` is part of what a trainer has to remember over a restart if its verdicts are to stay the same; give it
    back as `rows` together with the same release.
    """

    def __init__(
        self,
        release_id: str,
        model: CiUBM,
        *,
        learned_until: int | None,
        span_rows: int,
        rows: ComparedRows = NO_ROWS,
    ) -> None:
        self.release_id = release_id
        self._model = model.eval()
        self._learned_until = learned_until
        self._span_rows = span_rows
        self._tables: deque[ComparedRows] = deque([rows] if len(rows) else [])

    @classmethod
    def from_release(
        cls, weights: Mapping[str, Tensor], manifest: ModelManifest, *, span_rows: int, rows: ComparedRows = NO_ROWS
    ) -> Rival:
        """Build from what the model store holds. Raises `Misconfigured` if this version cannot."""
        try:
            model = CiUBM(CiUBMConfig.model_validate(manifest.config["model"]), vector_width=manifest.dim, seed=0)
            model.load_state_dict(dict(weights))
        except (KeyError, ValueError, RuntimeError) as error:
            raise Misconfigured(f"release {manifest.release_id} cannot be scored by this version: {error}") from error
        last = manifest.last_event_at
        return cls(
            manifest.release_id,
            model,
            learned_until=None if last is None else int(last.timestamp()),
            span_rows=span_rows,
            rows=rows,
        )

    def observe(self, rows: Sequence[Impression], batch: CtrBatch, candidate_B: NDArray[np.float64]) -> None:
        """Score a batch; `candidate_B` are the probabilities that the learner gave before its step."""
        unseen_B = np.array([self._learned_until is None or row.second > self._learned_until for row in rows])
        if not unseen_B.any():
            return
        with torch.inference_mode():
            serving_B = torch.sigmoid(self._model(batch).double()).numpy()
        self._tables.append(
            ComparedRows(
                user=np.array([row.user_id for row in rows])[unseen_B],
                label=np.array([row.label for row in rows], np.int64)[unseen_B],
                retaken=np.array([row.retaken for row in rows])[unseen_B],
                candidate=candidate_B[unseen_B],
                serving=serving_B[unseen_B],
            )
        )
        held = sum(map(len, self._tables))
        while held - len(self._tables[0]) >= self._span_rows:
            held -= len(self._tables.popleft())

    def forget(self, user_id: str) -> None:
        """Drop a user's rows."""
        columns = ("user", "label", "retaken", "candidate", "serving")
        kept = ((table, table.user != user_id) for table in self._tables)
        tables = (ComparedRows(**{name: getattr(t, name)[chosen] for name in columns}) for t, chosen in kept)
        self._tables = deque(table for table in tables if len(table))

    def snapshot(self) -> State:
        """Which release this is, and its tables of rows."""
        state = State({"lengths": whole_numbers(map(len, self._tables))}, {"release_id": self.release_id})
        rows = self.compared
        state.put_texts("user", rows.user.tolist())
        for name in ("label", "retaken", "candidate", "serving"):
            state.arrays[name] = getattr(rows, name)
        return state

    def restore(self, state: State) -> None:
        """Go on with the rows of `snapshot`, if that was of the same release."""
        if state.values["release_id"] != self.release_id:
            return
        columns = {name: state.arrays[name] for name in ("label", "retaken", "candidate", "serving")}
        columns["user"] = np.array(state.texts("user"), np.str_)
        ends = np.cumsum(state.arrays["lengths"]).tolist()
        self._tables = deque(
            ComparedRows(**{name: column[start:end] for name, column in columns.items()})
            for start, end in zip([0, *ends[:-1]], ends, strict=False)
        )

    @property
    def compared(self) -> ComparedRows:
        """The newest rows that both scored, at least `span_rows` of them if there were so many."""
        if not self._tables:
            return NO_ROWS
        if len(self._tables) == 1:
            return self._tables[0]
        columns = ("user", "label", "retaken", "candidate", "serving")
        return ComparedRows(**{name: np.concatenate([getattr(t, name) for t in self._tables]) for name in columns})


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold anything but finite numbers."""
    return [
        name
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
