"""Shadow evaluation: a candidate, the serving release and the best one score the same rows; none learns from them."""

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
from trainer.networks.scorer import network_of
from trainer.online.gate import NO_ROWS, ComparedKind, ComparedRows, Opponents
from trainer.online.kinds import KindScores
from trainer.samples.rows import Impression
from trainer.state import State, whole_numbers

Release: TypeAlias = "tuple[Mapping[str, Tensor], ModelManifest]"

_COLUMNS = ("label", "retaken", "candidate", "serving", "best")


class ShadowEvaluation:
    """Scores batches with the weights of releases until it has seen `rows_needed` rows.

    Rows are trained in the order of their seconds, so what a release learned from ends at its `last_event_at`; only
    rows later than those of candidate and serving release count. A late take that corrects a row is no second row.
    Nothing here draws random numbers or changes what training does.

    A snapshot holds the scores and the ids of the releases, not their weights: to restore it, build the evaluation from
    the same releases.
    """

    def __init__(
        self, candidate: Release, serving: Release, best: Release | None = None, *, rows_needed: int | None = None
    ) -> None:
        """`best` is the best release so far, if that is not the serving one; without `rows_needed` it goes on for ever.

        Raises `Misconfigured` if this version cannot build one of them, or if they read other features than the
        candidate: the rows have the candidate's.
        """
        for _, other in (serving, best or serving):
            if other.features != candidate[1].features:
                raise Misconfigured(f"release {other.release_id} reads other features: it cannot score the same rows")
        self.candidate = candidate[1]
        serves = serving[1].release_id
        behind = serving[1].rows_trained - candidate[1].rows_trained
        self.against = Opponents(serves, serves if best is None else best[1].release_id, max(behind, 0))
        """The releases that the candidate is compared with."""
        self._models = {"candidate": _built(candidate), "serving": _built(serving)}
        outputs = [self._models[name].config.kinds for name in ("candidate", "serving")]
        self._kinds = tuple(kind for kind in outputs[0] if kind in outputs[1])
        self._outputs_2K = [[1 + of.index(kind) for kind in self._kinds] for of in outputs]
        self._kind_tables: list[KindScores] = []
        """Each has the scores of the candidate and then those of the serving release."""
        if best is not None:
            self._models["best"] = _built(best)
        ends = [manifest.last_event_at for _, manifest in (candidate, serving)]
        self._learned_until = max((int(end.timestamp()) for end in ends if end is not None), default=-1)
        self._rows_needed = rows_needed
        self._tables: deque[ComparedRows] = deque()

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        """Score a batch, unless enough was scored."""
        unseen_B = np.array([row.second > self._learned_until and not row.correction for row in rows])
        if self.complete or not unseen_B.any():
            return
        with torch.inference_mode():
            outputs = {name: model.probabilities(batch).numpy() for name, model in self._models.items()}
        scores = {name: values_BO[:, 0] for name, values_BO in outputs.items()}
        if self._kinds:
            both = [outputs[name][:, own] for name, own in zip(("candidate", "serving"), self._outputs_2K, strict=True)]
            of_kinds = KindScores.of(rows, self._kinds, np.concatenate(both, axis=1))
            after_B = np.array([row.second > self._learned_until for row in rows])
            self._kind_tables.append(of_kinds.where(after_B))
        table = ComparedRows(
            user=np.array([row.user_id for row in rows]),
            label=np.array([row.label for row in rows], np.int64),
            retaken=np.array([row.retaken for row in rows]),
            candidate=scores["candidate"],
            serving=scores["serving"],
            best=scores.get("best", scores["serving"]),
        )
        self._tables.append(table.where(unseen_B))

    @property
    def complete(self) -> bool:
        """Whether it can be decided."""
        return self._rows_needed is not None and sum(map(len, self._tables)) >= self._rows_needed

    @property
    def compared(self) -> ComparedRows:
        """All rows that were scored."""
        if not self._tables:
            return NO_ROWS
        return ComparedRows(
            **{name: np.concatenate([getattr(table, name) for table in self._tables]) for name in ("user", *_COLUMNS)}
        )

    @property
    def compared_kinds(self) -> list[ComparedKind]:
        """The same of each kind that candidate and serving release both predict."""
        if not self._kind_tables:
            return []
        rows, found = KindScores.joined(self._kind_tables), []
        for place, kind in enumerate(self._kinds):
            said = rows.where(rows.new[:, place])
            ours, theirs = said.scores[:, place], said.scores[:, len(self._kinds) + place]
            found.append(ComparedKind(kind, said.labels[:, place].astype(np.int64), ours, theirs))
        return found

    def forget(self, user_id: str) -> None:
        """Remove a user's rows; as many others are scored instead."""
        self._kind_tables = [table.where(table.user != user_id) for table in self._kind_tables]
        tables = (table.where(table.user != user_id) for table in self._tables)
        self._tables = deque(table for table in tables if len(table))

    def snapshot(self) -> State:
        """The scores so far, and the ids of the releases."""
        rows = self.compared
        state = State(
            {"lengths": whole_numbers(map(len, self._tables))},
            {"release_id": self.candidate.release_id, "against": self.against.serving, "best": self.against.best},
        )
        state.put_texts("user", rows.user.tolist())
        for name in _COLUMNS:
            state.arrays[name] = getattr(rows, name)
        if self._kind_tables:
            state.put("kinds", KindScores.joined(self._kind_tables).snapshot())
        return state

    def restore(self, state: State) -> None:
        """Continue with the scores of `snapshot`. Raises `ValueError` if they are of other releases."""
        of = (state.values["release_id"], *compared_with(state))
        if of != (ours := (self.candidate.release_id, self.against.serving, self.against.best)):
            raise ValueError(f"scores of {of}, not of {ours}")
        arrays = {"best": state.arrays["serving"]} | state.arrays  # versions before had two releases
        columns = {name: arrays[name] for name in _COLUMNS} | {"user": np.array(state.texts("user"), np.str_)}
        self._kind_tables = [KindScores.restored(state.part("kinds"))] if "kinds" in state.values else []
        ends = np.cumsum(state.arrays["lengths"]).tolist()
        self._tables = deque(
            ComparedRows(**{name: column[start:end].copy() for name, column in columns.items()})
            for start, end in zip([0, *ends[:-1]], ends, strict=False)
        )


def compared_with(state: State) -> tuple[str, str]:
    """Ids of the serving and the best release of a snapshot."""
    return state.values["against"], state.values.get("best", state.values["against"])


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
        return network_of(weights, manifest)
    except (KeyError, ValueError, RuntimeError) as error:
        raise Misconfigured(f"release {manifest.release_id} cannot be scored by this version: {error}") from error
