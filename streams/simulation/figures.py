"""Figures of a simulated run: per model and bucket, with differences between models and between runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.simulation.run import SERVED, SimulatedRun
from trainer.datasets.spans import BehaviourLog
from trainer.metrics import buckets, paired_gauc_difference, user_auc
from trainer.offline.judging import judge

REFERENCE = "ciubm"
_SEED = 23


def spans_of(run: SimulatedRun, log: BehaviourLog | None) -> dict[str, NDArray[np.bool_]]:
    """The rows of each bucket: those of the demo's report, then the last third, and the test span of the folder.

    Re-takes are in buckets of their own alone. `test_cold` are items that were held out, or not taken before the test
    span; `test_new_users` are impressions of users who had taken nothing.
    """
    rows = run.scored
    found = buckets(rows)
    found["last_third"] = found["overall"] & (np.arange(len(rows)) >= 2 * len(rows) // 3)
    if log is not None:
        in_test = rows.occurred_at >= log.test.start
        names = np.array(log.data.item_ids)[np.flatnonzero(log.cold(log.test)) - 1]
        first = in_test & ~rows.retaken
        found["test"] = first & run.with_history
        found["test_cold"] = found["test"] & np.isin(rows.item, names)
        found["test_new_users"] = first & ~run.with_history
        found["test_retaken"] = in_test & rows.retaken
    return found


def figures_of(
    run: SimulatedRun,
    spans: Mapping[str, NDArray[np.bool_]],
    *,
    other: Mapping[str, NDArray[np.float64]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`figures`: model -> bucket -> auc, gauc, list_gauc, logloss and others; `paired`: GAUC of the reference minus
    each model, with 95 % intervals over users. `list_gauc` is the GAUC of what a user was shown in one second, as a
    page of answers is. `other` holds the scores of another run over the same rows; its models are named `other:...`.
    Buckets that are too small are None; the serving release is judged from its first row on.
    """
    rows = run.scored
    scores = dict(rows.scores)
    if other is not None:
        scores |= {f"other:{name}": values for name, values in other.items()}
    _, user = np.unique(rows.user, return_inverse=True)
    user = user.reshape(-1)
    _, shown = np.unique(np.stack([user, rows.occurred_at]), axis=1, return_inverse=True)
    shown = shown.reshape(-1)
    figures: dict[str, dict[str, Any]] = {}
    paired: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        known = np.isfinite(values)
        base = SERVED if name == f"other:{SERVED}" else REFERENCE
        for bucket, chosen in spans.items():
            chosen = chosen & known & np.isfinite(scores[base])
            labels = rows.label[chosen]
            found = judge(user[chosen], labels, values[chosen], calibrated=True)
            if found is not None:
                del found.figures["calibration"]
                found.figures["list_gauc"] = user_auc(shown[chosen], labels, values[chosen]).weighted
            figures.setdefault(name, {})[bucket] = None if found is None else found.figures
            if name == base:
                continue
            gain = None
            if found is not None:
                rng = np.random.default_rng([seed, _SEED])
                gain = paired_gauc_difference(user[chosen], labels, scores[base][chosen], values[chosen], rng=rng)
            paired.setdefault(f"{base}-{name}", {})[bucket] = (
                None if gain is None else {"difference": gain.difference, "low": gain.low, "high": gain.high}
            )
    return {"figures": figures, "paired": paired}
