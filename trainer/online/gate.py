"""The promotion gate: may a candidate replace the serving release? Decided from scores alone.

A candidate is in shadow evaluation (`shadow_evaluation`) over the next rows of the log. Its weights and those of the
serving release stay as they are, both score each row before anything is learned from it, both see the same vectors and
histories, and the rows are the newest there are. The model that goes on learning takes no part: scores of weights that
change meanwhile cannot be put in one order, and were seen to lose .01 GAUC to weights that stay.

The price is a delay of `trial_rows` rows before a candidate is served, and two more forward passes, without gradients,
over these rows. Resampling users says what a difference of two models means on so few rows: a candidate is refused for
what is worse by more than the margin and by more than chance.

Releases that each lose less than the margin would add up. The best release so far therefore scores the same rows, where
it is not the serving one and is kept, and a candidate that is worse than both is measured against the better of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from schemas.manifests import PromotionDecision
from trainer.metrics import MIN_USERS, log_loss, paired_gauc_difference, user_auc


class GateConfig(BaseModel):
    """When a candidate may be promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trial_rows: int = Field(default=4_000, ge=1)
    """Rows that candidate and serving release both score before it is decided; the candidate waits for that long, and
    the next one is taken no sooner, also where MIM_TRAINER__RELEASE_EVERY_ROWS is less. `train --until-end` compares on
    the last rows of the log, before it learns from them."""
    gauc_margin: float = Field(default=0.01, ge=0)
    """How far the candidate's GAUC may lie below that of the serving release, and of the best one that is kept
    (MIM_MODELS__KEEP_RELEASES)."""
    log_loss_margin: float = Field(default=0.03, ge=0)
    """How far its log-loss may lie above that of these releases, as a share of it."""
    calibration_low: float = Field(default=0.7, gt=0, le=1)
    """Least ratio of predicted to observed takes; it may be missed if the serving release misses it by more."""
    calibration_high: float = Field(default=1.4, ge=1)
    """Greatest such ratio."""
    min_takes: int = Field(default=100, ge=1)
    """Takes in the span below which the ratio says too little to be judged."""


@dataclass(frozen=True)
class ComparedRows:
    """Rows that all models scored and none learned from, in training order; all of one length."""

    user: NDArray[np.str_]
    label: NDArray[np.int64]
    retaken: NDArray[np.bool_]
    candidate: NDArray[np.float64]
    """Probabilities of the candidate."""
    serving: NDArray[np.float64]
    """Probabilities of the serving release."""
    best: NDArray[np.float64]
    """Probabilities of the best release so far; those of the serving one where that is the best."""

    def __len__(self) -> int:
        return len(self.label)

    def where(self, chosen: NDArray[np.bool_]) -> ComparedRows:
        """Some of the rows."""
        return ComparedRows(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


NO_ROWS = ComparedRows(
    np.empty(0, np.str_), np.empty(0, np.int64), np.empty(0, np.bool_), *(np.empty(0, np.float64) for _ in range(3))
)


@dataclass(frozen=True)
class ComparedKind:
    """The rows that say something of one further kind of take: impressions, and late takes of them."""

    kind: str
    label: NDArray[np.int64]
    candidate: NDArray[np.float64]
    serving: NDArray[np.float64]


@dataclass(frozen=True)
class Opponents:
    """The releases that a candidate is compared with."""

    serving: str
    """The serving release."""
    best: str
    """The best release so far: the serving one, or an earlier one."""
    rows_behind: int = 0
    """How many rows fewer than the serving release the candidate learned from; 0 if not fewer."""


def judge(
    rows: ComparedRows,
    config: GateConfig,
    *,
    against: Opponents | None,
    kinds: Sequence[ComparedKind] = (),
    not_finite: Collection[str] = (),
) -> PromotionDecision:
    """Decide about a candidate. `against` are the releases that scored `rows` beside it, None if there were none.
    `kinds` are those that candidate and serving release both predict.

    `not_finite` names what of the candidate is no finite number; that refuses even a first release.
    Re-takes take part in the calibration alone: who buys soap again says little about a model.
    """
    reasons = [f"{name} holds values that are not finite" for name in sorted(not_finite)]
    remarks: list[str] = []
    figures: dict[str, float | None] = {}
    best = None if against is None or against.best == against.serving else against.best
    if against is None:
        remarks.append("nothing was compared: no serving release could be scored beside it")
    else:
        if len(rows) < config.trial_rows:
            _too_few(rows, config, against, reasons, remarks)
        if not np.isfinite(rows.candidate).all():
            reasons.append(f"{int((~np.isfinite(rows.candidate)).sum())} of {len(rows)} scores are not finite")
        elif not (np.isfinite(rows.serving).all() and np.isfinite(rows.best).all()):
            remarks.append(f"{against.serving} gives scores that are not finite: anything that does not is better")
            best = None
        elif len(rows):
            best = _compare_order(rows, config, against, figures, reasons, remarks)
            _compare_level(rows, config, figures, reasons, remarks)
            for one in kinds:
                _compare_kind(one, config, figures, reasons, remarks)
    return PromotionDecision(
        passed=not reasons,
        reasons=reasons,
        remarks=remarks,
        against=None if against is None else against.serving,
        best=best,
        rows=len(rows),
        figures=figures,
    )


def _too_few(
    rows: ComparedRows, config: GateConfig, against: Opponents, reasons: list[str], remarks: list[str]
) -> None:
    """A comparison on few rows sees only large differences: the candidate has to know no less, besides."""
    compared = f"compared on {len(rows)} rows only, MIM_GATE__TRIAL_ROWS asks for {config.trial_rows}"
    if against.rows_behind:
        reasons.append(
            f"{compared}, and trained on {against.rows_behind} rows fewer than {against.serving}; if it is to serve "
            "all the same: 'mimstream models promote'"
        )
    else:
        remarks.append(compared)


@dataclass(frozen=True)
class _Order:
    """How well one model orders rows, and how far it is from their labels."""

    scores: NDArray[np.float64]
    loss: float
    losses: NDArray[np.float64]
    gauc: float | None
    """None if too few users have both labels."""


def _compare_order(
    rows: ComparedRows,
    config: GateConfig,
    against: Opponents,
    figures: dict[str, float | None],
    reasons: list[str],
    remarks: list[str],
) -> str | None:
    """Add what was found; returns the release that is better than the candidate and the best so far, if any."""
    before = None if against.best == against.serving else against.best
    rows = rows.where(~rows.retaken)
    label = rows.label
    if not 0 < label.sum() < len(label):
        remarks.append("rows of one label only: nothing to tell apart")
        return before
    _, users = np.unique(rows.user, return_inverse=True)
    users = users.reshape(-1)

    def order(scores: NDArray[np.float64]) -> _Order:
        per_user = user_auc(users, label, scores)
        enough = len(per_user.auc) >= MIN_USERS
        losses = _losses(label, scores)
        return _Order(scores, log_loss(label, scores), losses, per_user.weighted if enough else None)

    ours, serving = order(rows.candidate), order(rows.serving)
    best = serving if before is None else order(rows.best)
    figures |= {"ciubm_logloss": ours.loss, "serving_logloss": serving.loss}
    if ours.gauc is None or serving.gauc is None:
        both = len(user_auc(users, label, rows.candidate).auc)
        remarks.append(f"{both} users with both labels, GAUC needs {MIN_USERS}")
    else:
        figures |= {"ciubm_gauc": ours.gauc, "serving_gauc": serving.gauc}
    if before is not None:
        figures |= {"best_logloss": best.loss, "best_gauc": best.gauc}
    names = [(serving, "the serving release")]
    if before is not None:
        names.append((best, f"the best release {before}"))
    for theirs, name in names:
        # better than what serves: keeping that one instead would be no gain
        if theirs is serving or ours.loss > serving.loss:
            chance = 1.96 * float((ours.losses - theirs.losses).std()) / math.sqrt(len(label))
            if ours.loss > theirs.loss * (1 + config.log_loss_margin) and ours.loss - theirs.loss > chance:
                reasons.append(
                    f"log-loss {ours.loss:.4f} against {theirs.loss:.4f} of {name}, more than "
                    f"{config.log_loss_margin:.1%} above"
                )
        if ours.gauc is None or theirs.gauc is None or serving.gauc is None:
            continue
        if (theirs is serving or ours.gauc < serving.gauc) and ours.gauc < theirs.gauc - config.gauc_margin:
            interval = paired_gauc_difference(
                users, label, ours.scores, theirs.scores, rng=np.random.default_rng(len(label)), rounds=500
            )
            assert interval is not None
            if interval.high < 0:
                reasons.append(
                    f"GAUC {ours.gauc:.4f} against {theirs.gauc:.4f} of {name}, more than {config.gauc_margin:g} below"
                )
    return _better(against, ours, best)


def _better(against: Opponents, ours: _Order, best: _Order) -> str | None:
    """The best release so far, unless the candidate is as good in both figures: neither can decline unseen."""
    ordered = ours.gauc is None or best.gauc is None or ours.gauc >= best.gauc
    return None if ordered and ours.loss <= best.loss else against.best


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


def _compare_kind(
    one: ComparedKind, config: GateConfig, figures: dict[str, float | None], reasons: list[str], remarks: list[str]
) -> None:
    """Whether a further kind is predicted worse than by the serving release. How many of its takes are still to come is
    not known yet, so that their level is not judged.
    """
    takes = int(one.label.sum())
    if takes < config.min_takes:
        remarks.append(f"{takes} takes of kind {one.kind}, a comparison needs {config.min_takes}")
        return
    if not np.isfinite(one.candidate).all():
        reasons.append(f"scores of kind {one.kind} are not finite")
        return
    ours, theirs = _losses(one.label, one.candidate), _losses(one.label, one.serving)
    figures |= {f"{one.kind}_logloss": float(ours.mean()), f"serving_{one.kind}_logloss": float(theirs.mean())}
    behind, chance = float((ours - theirs).mean()), 1.96 * float((ours - theirs).std()) / math.sqrt(len(ours))
    if behind > config.log_loss_margin * float(theirs.mean()) and behind > chance:
        reasons.append(
            f"log-loss of kind {one.kind} {ours.mean():.4f} against {theirs.mean():.4f} of the serving release, more "
            f"than {config.log_loss_margin:.1%} above"
        )


def _losses(label: NDArray[np.int64], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.where(label == 1, -np.log(p), -np.log1p(-p))


def _off(ratio: float) -> float:
    return abs(math.log(max(ratio, 1e-12)))
