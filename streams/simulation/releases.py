"""Releases of a simulated trainer: made when they are due, compared by the gate, and what serves meanwhile.

The rules are those of `streams.training.release_schedule` and `promotion_gate`, with the releases in memory: one
candidate at a time, the next rows begin with it, and the first one serves without a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from schemas.manifests import ModelManifest, PromotionDecision
from streams.stores.artifacts.registry import pack_weights, weights_checksum
from trainer.networks.ciubm import CtrBatch
from trainer.networks.scorer import Scorer
from trainer.online.gate import NO_ROWS, GateConfig, judge
from trainer.online.shadow_evaluation import Release, ShadowEvaluation, not_finite
from trainer.online.trainer import Candidate, OnlineTrainer
from trainer.samples.rows import Impression


class SimulatedReleases:
    """Call `act` between two calls of the trainer. As an observer of its batches it scores them as a server would."""

    def __init__(self, trainer: OnlineTrainer, config: GateConfig, *, now: datetime) -> None:
        self._trainer = trainer
        self._config = config
        self._now = now
        self._candidate: Release | None = None
        self._serving: Release | None = None
        self._best: Release | None = None
        self._scorer: Scorer | None = None
        self._scores: list[NDArray[np.float64]] = []
        self.decisions: list[PromotionDecision] = []
        """What the gate said of each candidate, the first included."""

    def act(self) -> None:
        """Decide about the candidate in shadow evaluation, or make one where it is due."""
        trainer = self._trainer
        shadow = trainer.shadow
        if shadow is not None:
            if not shadow.complete:
                return
            assert self._candidate is not None, "it is in shadow evaluation"
            trainer.shadow = None
            rows, kinds = shadow.compared, shadow.compared_kinds
            self._conclude(self._candidate, judge(rows, self._config, against=shadow.against, kinds=kinds))
        if not trainer.release_due():
            return
        made = trainer.candidate()
        candidate = self._candidate = (made.weights, self._manifest(made))
        bad = not_finite(made.weights)
        trainer.begin_next()
        if self._serving is None or bad:
            self._conclude(candidate, judge(NO_ROWS, self._config, against=None, not_finite=bad))
            return
        trainer.shadow = ShadowEvaluation(candidate, self._serving, self._best, rows_needed=self._config.trial_rows)

    def _conclude(self, candidate: Release, decision: PromotionDecision) -> None:
        self.decisions.append(decision)
        if not decision.passed:
            return
        held = [one for one in (self._serving, self._best) if one is not None]
        self._best = next((one for one in held if one[1].release_id == decision.best), None)
        self._serving = candidate
        self._scorer = Scorer.from_release(*candidate)

    def observe(self, rows: Sequence[Impression], batch: CtrBatch) -> None:
        """Score a batch with the serving release: NaN before the first."""
        seen_B = np.array([not row.correction for row in rows])
        scores_B = np.full(len(rows), np.nan)
        if self._scorer is not None:
            scores_B = self._scorer.probabilities(batch)[:, 0]
        self._scores.append(scores_B[seen_B])

    @property
    def scores(self) -> NDArray[np.float64]:
        """What was served, a number per scored row in training order."""
        return np.concatenate(self._scores) if self._scores else np.zeros(0)

    def _manifest(self, made: Candidate) -> ModelManifest:
        checksum = weights_checksum(pack_weights(made.weights))
        return ModelManifest(
            release_id=f"r{len(self.decisions) + 1:06d}-{checksum[:12]}",
            weights_sha256=checksum,
            encoder_version=self._trainer.encoder_version,
            dim=self._trainer.catalogue.dim,
            created_at=self._now,
            last_event_at=None if made.last_event_at is None else datetime.fromtimestamp(made.last_event_at, UTC),
            rows_trained=made.rows_trained,
            steps=made.steps,
            rows_sha256=made.rows_sha256,
            offsets={},
            config=made.config,
        )
