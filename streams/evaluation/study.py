"""A study: every model tuned with the same effort, refitted, and scored once on the test span. Resumable.

```text
OUT/study.json            what the figures depend on; another study is refused this folder
OUT/vectors-SEED.npz      item vectors per encoder version
OUT/tuning/MODEL.json     validation GAUC of each trial
OUT/scores/MODEL-SEED.npz test scores, with the seconds that the fit took
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from trainer.metrics import user_auc
from trainer.offline import registry
from trainer.offline.buckets import buckets
from trainer.offline.columns import EXPOSURE_SEED, Recorded
from trainer.offline.data import CtrData
from trainer.offline.encoder_versions import EncoderVersions, VectorKind, Vectors
from trainer.offline.leak_checks import leaks
from trainer.offline.model import CtrModel
from trainer.offline.protocols import Protocol
from trainer.offline.similarities import similarity_features

log = structlog.get_logger()

TUNING_SEED = 0
FORMAT = 1


@dataclass(frozen=True, eq=False)
class TestScores:
    """One model with one seed on the test rows."""

    model: str
    seed: int
    score_N: NDArray[np.float64]
    calibrated: bool
    fit_seconds: float
    predict_seconds: float


class Study:
    """One folder under one protocol with one kind of vectors.

    Raises `Misconfigured` if `out` holds another study, or if a span has no rows to learn from or to judge by.
    """

    def __init__(self, recorded: Recorded, protocol: Protocol, make_versions: Callable[[], EncoderVersions],
                 kind: VectorKind, out: Path, *, encoder: Mapping[str, Any]) -> None:  # fmt: skip
        self.recorded, self.protocol, self.kind, self.out = recorded, protocol, kind, out
        self._make_versions = make_versions
        self.train_rows = np.flatnonzero(recorded.learned_from(protocol.train))
        self.validation_rows = np.flatnonzero(recorded.learned_from(protocol.validation))
        self.tuned_on = np.flatnonzero(protocol.validation.holds(recorded.rows.second_N))
        self.test_rows = np.flatnonzero(recorded.judged_by(protocol.test))
        for name, rows in (
            ("training", self.train_rows),
            ("validation", self.validation_rows),
            ("test", self.test_rows),
        ):
            if len(np.unique(recorded.rows.label_N[rows])) < 2:
                raise Misconfigured(
                    f"the {name} span of {protocol.log.data.name} has {len(rows)} impressions of users with a history, "
                    "and not both labels; models cannot be compared on it"
                )
        self._data: tuple[int, CtrData] | None = None
        self._claim(encoder)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def tune(self, name: str, *, on_trial: Callable[[], None] = lambda: None) -> Mapping[str, Any]:
        """The best trial of a model by GAUC on the validation span; read back where it stands already.

        A single trial is not tried: there is nothing to choose from.
        """
        trials = self._trials(name)
        if len(trials) == 1:
            on_trial()
            return trials[0]
        done = self._tried(name)
        for trial in trials:
            if all(row["trial"] != trial for row in done):
                done.append(self._try(name, trial))
                _write_text(self._tuning_file(name), json.dumps(done, indent=1))
                log.info("evaluate.tried", model=name, gauc=round(done[-1]["gauc"], 4), **trial)
            on_trial()
        chosen: Mapping[str, Any] = self._best(name, done)["trial"]
        return chosen

    def tuning(self, name: str) -> list[dict[str, Any]]:
        """What was tried for a model: trial, gauc, seconds, and which was chosen."""
        done = self._tried(name)
        best = self._best(name, done) if done else None
        return [row | {"chosen": row is best} for row in done]

    def score(self, name: str, seed: int, trial: Mapping[str, Any]) -> TestScores:
        """Fit on training and validation span, score the test span; read back where it stands already."""
        path = self.out / "scores" / f"{_file_name(name)}-{seed}.npz"
        found = self._stored(path, name, seed, trial)
        if found is not None:
            return found
        data = self.data(seed)
        model = registry.create(name)
        started = time.perf_counter()
        rows = np.concatenate([self.train_rows, self.validation_rows])
        model.fit(data.select(rows), None, seed=seed, trial=trial)
        fitted = time.perf_counter()
        scores = self._checked(model, data.select(self.test_rows))
        result = TestScores(name, seed, scores, model.calibrated, fitted - started, time.perf_counter() - fitted)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part.npz")
        np.savez(
            unfinished,
            score=scores,
            calibrated=model.calibrated,
            seconds=np.array([result.fit_seconds, result.predict_seconds]),
            trial=json.dumps(trial, sort_keys=True),
        )
        os.replace(unfinished, path)
        log.info("evaluate.scored", model=name, seed=seed, seconds=round(result.fit_seconds, 1))
        return result

    def data(self, seed: int) -> CtrData:
        """The columns with vectors and similarities of one seed."""
        if self._data is None or self._data[0] != seed:
            data = with_vectors(self.recorded, self._vectors(seed))
            learned = np.zeros(len(data), bool)
            learned[np.concatenate([self.train_rows, self.validation_rows])] = True
            found = leaks(data, encoder_stops=np.array(self.protocol.encoder_stops), learned_from_N=learned)
            found = [*self.recorded.leaks, *found]
            assert not found, "; ".join(found)
            self._data = (seed, data)
        return self._data[1]

    # ---- inside --------------------------------------------------------------------------------------------------

    def _trials(self, name: str) -> list[dict[str, Any]]:
        # as JSON gives them back, so that a stored trial equals itself
        trials: list[dict[str, Any]] = json.loads(json.dumps([dict(trial) for trial in registry.create(name).trials]))
        return trials

    def _tuning_file(self, name: str) -> Path:
        return self.out / "tuning" / f"{_file_name(name)}.json"

    def _tried(self, name: str) -> list[dict[str, Any]]:
        path, trials = self._tuning_file(name), self._trials(name)
        stored: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return [row for row in stored if row["trial"] in trials]

    def _best(self, name: str, done: list[dict[str, Any]]) -> dict[str, Any]:
        trials = self._trials(name)
        return max(done, key=lambda row: (row["gauc"], -trials.index(row["trial"])))

    def _try(self, name: str, trial: Mapping[str, Any]) -> dict[str, Any]:
        data = self.data(TUNING_SEED)
        model = registry.create(name)
        started = time.perf_counter()
        model.fit(data.select(self.train_rows), None, seed=TUNING_SEED, trial=trial)
        scores = self._checked(model, data.select(self.tuned_on))
        chosen = buckets(self.recorded.facts.select(self.tuned_on))["overall"]
        rows = self.recorded.rows
        users, labels = rows.user_N[self.tuned_on][chosen], rows.label_N[self.tuned_on][chosen].astype(np.int64)
        gauc = user_auc(users, labels, scores[chosen]).weighted
        return {"trial": dict(trial), "gauc": gauc, "seconds": round(time.perf_counter() - started, 2)}

    def _checked(self, model: CtrModel, data: CtrData) -> NDArray[np.float64]:
        scores = np.asarray(model.predict(data), np.float64)
        if scores.shape != (len(data),) or not np.isfinite(scores).all():
            raise ArithmeticError(
                f"{model.name} gave scores of shape {scores.shape} for {len(data)} rows, or not finite"
            )
        return scores

    def _stored(self, path: Path, name: str, seed: int, trial: Mapping[str, Any]) -> TestScores | None:
        if not path.exists():
            return None
        with np.load(path) as stored:
            if str(stored["trial"]) != json.dumps(trial, sort_keys=True):
                return None
            fit_seconds, predict_seconds = (float(one) for one in stored["seconds"])
            return TestScores(name, seed, stored["score"], bool(stored["calibrated"]), fit_seconds, predict_seconds)

    def _vectors(self, seed: int) -> Vectors:
        return stored_vectors(self.out, self._make_versions, self.kind, seed)

    def _claim(self, encoder: Mapping[str, Any]) -> None:
        rows = self.recorded.rows
        digest = hashlib.sha256()
        for column in (
            rows.user_N,
            rows.item_N,
            rows.second_N,
            rows.label_N,
            rows.dense_NF,
            rows.query_N,
            rows.trigger_N,
        ):
            if column is not None:
                digest.update(np.ascontiguousarray(column).tobytes())
        about = {
            "format": FORMAT,
            "data": self.protocol.log.data.name,
            "protocol": self.protocol.name,
            "labels": self.recorded.labels,
            "vectors": self.kind,
            "encoder": encoder,
            "encoder_stops": list(self.protocol.encoder_stops),
            "features": list(rows.dense_names),
            "impressions": digest.hexdigest(),
            "exposure_seed": EXPOSURE_SEED,
            "queries": "auto" if self.recorded.reads_searches else "off",
        }
        about = json.loads(json.dumps(about, default=str))
        path = self.out / "study.json"
        if path.exists():
            # earlier studies did not say so
            stored = {"labels": "takes", "queries": "off"} | json.loads(path.read_text())
            differing = [name for name in about if stored.get(name) != about[name]]
            if differing:
                raise Misconfigured(
                    f"--out {self.out} holds a study with other {', '.join(differing)}; choose another folder"
                )
        _write_text(path, json.dumps(about, indent=1))


def stored_vectors(out: Path, make_versions: Callable[[], EncoderVersions], kind: VectorKind, seed: int) -> Vectors:
    """The vectors of a study in this folder; trained and written there if they are not yet."""
    path = out / f"vectors-{seed}.npz"
    if path.exists():
        with np.load(path) as stored:
            return Vectors(stored["vectors"], stored["has"])
    started = time.perf_counter()
    vectors = make_versions().vectors(kind, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, vectors=vectors.vectors_EIV, has=vectors.has_vector_EI)
    os.replace(unfinished, path)
    log.info("evaluate.encoded", vectors=kind, seed=seed, versions=len(vectors.vectors_EIV),
             seconds=round(time.perf_counter() - started, 1))  # fmt: skip
    return vectors


def with_vectors(recorded: Recorded, vectors: Vectors) -> CtrData:
    """Columns with vectors, and the similarities of target and history among the features."""
    items = replace(recorded.items, vectors_EIV=vectors.vectors_EIV, has_vector_EI=vectors.has_vector_EI)
    data = CtrData(items, recorded.histories, recorded.rows)
    similar, names = similarity_features(data)
    dense = np.concatenate([recorded.rows.dense_NF, similar], axis=1)
    return replace(data, rows=replace(recorded.rows, dense_NF=dense, dense_names=(*recorded.rows.dense_names, *names)))


def run_study(study: Study, models: Sequence[str], seeds: int, *, advance: Callable[[int], None]) -> list[TestScores]:
    """All models with all seeds. Seeds are the outer loop, so that a run that is cut short is cut short evenly."""
    trials = {}
    for name in models:
        trials[name] = study.tune(name, on_trial=lambda: advance(1))
    found = []
    for seed in range(seeds):
        for name in models:
            found.append(study.score(name, seed, trials[name]))
            advance(1)
    return found


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
