"""The promotion gate: may a candidate replace the serving release? Decided from scores alone.

A candidate is in shadow evaluation (`shadow_evaluation`) over the next rows of the log. Its weights and those of the
serving release stay as they are, both score each row before anything is learned from it, both see the same vectors and
histories, and the rows are the newest there are. The model that goes on learning takes no part: scores of weights that
change meanwhile cannot be put in one order, and were seen to lose .01 GAUC to weights that stay.

The price is a delay of `trial_rows` rows before a candidate is served, and two more forward passes, without gradients,
over these rows. Resampling users says what a difference of two models means on so few rows: a candidate is refused for
what is worse by more than the margin and by more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from schemas.manifests import PromotionDecision
from trainer.metrics import MIN_USERS, log_loss, paired_gauc_difference, user_auc


class GateConfig(BaseModel):
    """When a candidate may be promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trial_rows: int = Field(default=4_000, ge=1)
    """Rows that candidate and serving release both score before it is decided; the candidate waits for that long.
    Where candidates come faster than after twice as many rows (MIM_TRAINER__RELEASE_EVERY_ROWS), none is compared."""
    gauc_margin: float = Field(default=0.01, ge=0)
    """How far the candidate's GAUC may lie below that of the serving release."""
    log_loss_margin: float = Field(default=0.03, ge=0)
    """How far its log-loss may lie above that of the serving release, as a share of the latter."""
    calibration_low: float = Field(default=0.7, gt=0, le=1)
    """Least ratio of predicted to observed takes; it may be missed if the serving release misses it by more."""
    calibration_high: float = Field(default=1.4, ge=1)
    """Greatest such ratio."""
    min_takes: int = Field(default=100, ge=1)
    """Takes in the span below which the ratio says too little to be judged."""


@dataclass(frozen=True)
class ComparedRows:
    """Rows that both models scored and neither learned from, in training order; all of one length."""

    user: NDArray[np.str_]
    label: NDArray[np.int64]
    retaken: NDArray[np.bool_]
    candidate: NDArray[np.float64]
    """Probabilities of the candidate."""
    serving: NDArray[np.float64]
    """Probabilities of the serving release."""

    def __len__(self) -> int:
        return len(self.label)


NO_ROWS = ComparedRows(
    np.empty(0, np.str_), np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.float64), np.empty(0, np.float64)
)


def judge(
    rows: ComparedRows, config: GateConfig, *, against: str | None, not_finite: Collection[str] = ()
) -> PromotionDecision:
    """Decide about a candidate. `against` names the release that scored `rows` beside it, None if there was none.

    `not_finite` names what of the candidate is no finite number; that refuses even a first release.
    Re-takes take part in the calibration alone: who buys soap again says little about a model.
    """
    reasons = [f"{name} holds values that are not finite" for name in sorted(not_finite)]
    remarks: list[str] = []
    figures: dict[str, float | None] = {}
    if against is None:
        remarks.append("nothing was compared: no serving release could be scored beside it")
    elif len(rows) < config.trial_rows:
        remarks.append(f"{len(rows)} rows were scored beside {against}, {config.trial_rows} are needed to compare")
    elif not np.isfinite(rows.candidate).all():
        reasons.append(f"{int((~np.isfinite(rows.candidate)).sum())} of {len(rows)} scores are not finite")
    elif not np.isfinite(rows.serving).all():
        remarks.append(f"{against} gives scores that are not finite: anything that does not is better")
    else:
        _compare_order(rows, config, figures, reasons, remarks)
        _compare_level(rows, config, figures, reasons, remarks)
    return PromotionDecision(
        passed=not reasons, reasons=reasons, remarks=remarks, against=against, rows=len(rows), figures=figures
    )


def _compare_order(
    rows: ComparedRows,
    config: GateConfig,
    figures: dict[str, float | None],
    reasons: list[str],
    remarks: list[str],
) -> None:
    first = ~rows.retaken
    label = rows.label[first]
    if not 0 < label.sum() < len(label):
        remarks.append("rows of one label only: nothing to tell apart")
        return
    _, users = np.unique(rows.user[first], return_inverse=True)
    ours, theirs = rows.candidate[first], rows.serving[first]
    our_users, their_users = user_auc(users.reshape(-1), label, ours), user_auc(users.reshape(-1), label, theirs)
    our_loss, their_loss = log_loss(label, ours), log_loss(label, theirs)
    figures |= {"ciubm_logloss": our_loss, "serving_logloss": their_loss}
    per_row = _losses(label, ours) - _losses(label, theirs)
    chance = 1.96 * float(per_row.std()) / math.sqrt(len(label))
    if our_loss > their_loss * (1 + config.log_loss_margin) and our_loss - their_loss > chance:
        reasons.append(
            f"log-loss {our_loss:.4f} against {their_loss:.4f} of the serving release, more than "
            f"{config.log_loss_margin:.1%} above"
        )
    if len(our_users.auc) < MIN_USERS:
        remarks.append(f"{len(our_users.auc)} users with both labels, GAUC needs {MIN_USERS}")
        return
    our_gauc, their_gauc = our_users.weighted, their_users.weighted
    figures |= {"ciubm_gauc": our_gauc, "serving_gauc": their_gauc}
    interval = paired_gauc_difference(
        users.reshape(-1), label, ours, theirs, rng=np.random.default_rng(len(label)), rounds=500
    )
    assert interval is not None
    if our_gauc < their_gauc - config.gauc_margin and interval.high < 0:
        reasons.append(
            f"GAUC {our_gauc:.4f} against {their_gauc:.4f} of the serving release, more than "
            f"{config.gauc_margin:g} below"
        )


def _compare_level(
    rows: ComparedRows,
    config: GateConfig,
    figures: dict[str, float | None],
    reasons: list[str],
    remarks: list[str],
) -> None:
    takes = int(rows.label.sum())
    if takes < config.min_takes:
        remarks.append(f"{takes} takes, calibration needs {config.min_takes}")
        return
    ours, theirs = float(rows.candidate.sum()) / takes, float(rows.serving.sum()) / takes
    figures |= {"ciubm_calibration": ours, "serving_calibration": theirs}
    if config.calibration_low <= ours <= config.calibration_high:
        return
    outside = f"{ours:.2f} takes predicted per take, allowed are {config.calibration_low:g} to "
    outside += f"{config.calibration_high:g}"
    # when behaviour itself jumps, both are off at first: to keep the worse of two would be no gate
    if _off(ours) > _off(theirs):
        reasons.append(f"{outside}; the serving release predicts {theirs:.2f}")
    else:
        remarks.append(f"{outside}, but the serving release is farther off with {theirs:.2f}")


def _losses(label: NDArray[np.int64], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.where(label == 1, -np.log(p), -np.log1p(-p))


def _off(ratio: float) -> float:
    return abs(math.log(max(ratio, 1e-12)))
