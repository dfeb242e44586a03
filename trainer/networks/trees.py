"""Boosted trees beside the network: thresholds of numbers, where the network has curves.

They are boosted on their own from the same numbers, and the two logits are averaged: what trees and a network get wrong
is not the same. A fit reads the newest rows learned from, in order of time; the very newest of these say how many
trees are worth it, few where the numbers say little, and then as many are fitted to all of them. LightGBM does the work
(Ke et al., NeurIPS 2017).

Letters: B rows, X numbers, T trees, N inner nodes and L leaves of a whole tree, W rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.changed_rows import ChangedRows
from trainer.networks.config import TreesConfig
from trainer.state import State, Table, copied_rows

_HELD_BACK = 0.15
"""Share of a window's rows, the newest, that say how many trees are worth it."""
_PATIENCE = 15
"""Trees without a better log-loss on those rows after which more are not worth it."""
_TRIED_ON = 2
"""One of so many older rows is enough to see how many trees are worth it."""
_SHARES, _SHARE_HALF_LIFE = 6, 4_000
"""Weights of the trees that are compared, and judged rows after which a row counts half in that."""
_PARAMETERS = {
    "objective": "binary",
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "max_bin": 63,
    "bin_construct_sample_cnt": 20_000,
    "use_missing": False,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}


@dataclass(frozen=True, eq=False)
class Forest:
    """Fitted trees, each whole: the children of node n are 2n + 1 and, for numbers above the threshold, 2n + 2."""

    feature_TN: NDArray[np.int64]
    threshold_TN: NDArray[np.float32]
    value_TL: NDArray[np.float32]


@dataclass(frozen=True)
class TreesReport:
    """Trees of a stream at one moment."""

    trees: int
    """Fitted trees beside the network."""
    share: float
    """Weight of their logit."""
    fits: int
    """Fits made by this process."""
    fits_missed: int
    """Fits that were due and could not be made, because the rows had one label only."""


class BoostedTrees(nn.Module):
    """Fitted trees as buffers of a fixed shape, so that they travel in snapshots and releases as weights do."""

    feature_TN: Tensor
    threshold_TN: Tensor
    value_TL: Tensor
    share: Tensor

    def __init__(self, count: int, depth: int) -> None:
        super().__init__()
        self._depth = depth
        self.register_buffer("feature_TN", torch.zeros(count, 2**depth - 1, dtype=torch.int64))
        self.register_buffer("threshold_TN", torch.zeros(count, 2**depth - 1))
        self.register_buffer("value_TL", torch.zeros(count, 2**depth))
        self.register_buffer("share", torch.zeros(()))

    def load(self, forest: Forest, share: float) -> None:
        """Take over fitted trees, whose logit weighs `share` beside the network's."""
        count = len(forest.value_TL)
        for buffer, fitted in (
            (self.feature_TN, forest.feature_TN),
            (self.threshold_TN, forest.threshold_TN),
            (self.value_TL, forest.value_TL),
        ):
            buffer.zero_()
            buffer[:count] = torch.from_numpy(fitted)
        self.share.fill_(share)

    @property
    def fitted(self) -> bool:
        """Whether there are trees."""
        return bool(self.value_TL.any())

    def trimmed(self) -> BoostedTrees:
        """The same without trees that say nothing."""
        says_T = self.value_TL.any(1)
        trees = BoostedTrees(0, self._depth)
        for name in ("feature_TN", "threshold_TN", "value_TL"):
            setattr(trees, name, getattr(self, name)[says_T])
        trees.share = self.share
        return trees

    def forward(self, numbers_BX: Tensor) -> Tensor:
        """Logits of the trees alone, shape (B,)."""
        # every node's answer first: one pass over long rows costs less than a look-up per tree and level
        above_TNB = numbers_BX.T.contiguous().index_select(0, self.feature_TN.flatten())
        above_TNB = (above_TNB > self.threshold_TN.flatten()[:, None]).reshape(*self.feature_TN.shape, -1)
        node_TB = above_TNB[:, 0].long() + 1
        for _ in range(self._depth - 1):
            node_TB = 2 * node_TB + 1 + above_TNB.gather(1, node_TB[:, None]).squeeze(1)
        return self.value_TL.gather(1, node_TB - (2**self._depth - 1)).sum(0)

    def mixed(self, logits_B: Tensor, numbers_BX: Tensor) -> Tensor:
        """The network's logits and the trees', weighed by `share`; the network's alone before the first fit."""
        return torch.lerp(logits_B, self(numbers_BX), self.share) if self.fitted else logits_B


def fit_trees(
    config: TreesConfig,
    numbers_WX: NDArray[np.float32],
    label_W: NDArray[np.float32],
    weight_W: NDArray[np.float32] | None = None,
    *,
    seed: int,
) -> Forest | None:
    """Boost trees on rows in order of time; None where the older or the newest rows have one label only."""
    kept = len(label_W) - int(len(label_W) * _HELD_BACK)
    tried_P = np.sort(np.random.default_rng(seed).permutation(kept)[: -(-kept // _TRIED_ON)])
    newest_P = np.arange(kept, len(label_W))
    if any(len(np.unique(label_W[part_P])) < 2 for part_P in (tried_P, newest_P)):
        return None
    import lightgbm  # here, because servers have fitted trees and never fit any

    parameters = _PARAMETERS | {
        "num_leaves": config.leaves,
        "max_depth": config.depth,
        "learning_rate": config.learning_rate,
        "min_data_in_leaf": config.leaf_rows,
        "seed": seed,
    }
    all_rows = lightgbm.Dataset(numbers_WX, label_W, weight=weight_W, params=parameters)
    trial = lightgbm.train(
        parameters | {"min_data_in_leaf": -(-config.leaf_rows // _TRIED_ON)},
        all_rows.construct().subset(tried_P),
        num_boost_round=config.count,
        valid_sets=[all_rows.subset(newest_P)],
        callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)],
    )
    booster = lightgbm.train(parameters, all_rows, num_boost_round=trial.best_iteration)
    trees = booster.dump_model()["tree_info"]
    return _whole([tree["tree_structure"] for tree in trees], config.depth)


def _whole(trees: list[dict[str, object]], depth: int) -> Forest:
    """Trees of LightGBM's dump, filled up: a leaf that is not at the bottom is all leaves below it."""
    count, inner = len(trees), 2**depth - 1
    feature_TN, value_TL = np.zeros((count, inner), np.int64), np.zeros((count, inner + 1))
    threshold_TN = np.zeros((count, inner))

    def fill(tree: int, node: dict[str, object], place: int, level: int) -> None:
        if "leaf_value" in node:
            below = 2 ** (depth - level)
            first = (place + 1) * below - 1 - inner
            value_TL[tree, first : first + below] = node["leaf_value"]
            return
        feature_TN[tree, place], threshold_TN[tree, place] = node["split_feature"], node["threshold"]
        fill(tree, node["left_child"], 2 * place + 1, level + 1)  # type: ignore[arg-type]
        fill(tree, node["right_child"], 2 * place + 2, level + 1)  # type: ignore[arg-type]

    for number, tree in enumerate(trees):
        fill(number, tree, 0, 0)
    return Forest(feature_TN, _rounded_down(threshold_TN), value_TL.astype(np.float32))


def _rounded_down(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """To the next float32 that is not above, so that the same float32 numbers are above it."""
    rounded = numbers.astype(np.float32)
    return np.where(rounded > numbers, np.nextafter(rounded, np.float32(-np.inf)), rounded)


class TreeShare:
    """What the trees' logit weighs in a stream: what would have served the last rows best, before they were learned.

    A network remembers all that it learned from, trees a window: early in a stream they are worth a half beside it, and
    later less. Of a few weights up to the configured one that of the least log-loss counts, rows by their age.
    """

    def __init__(self, most: float) -> None:
        self._shares_S = torch.linspace(0, most, _SHARES)
        self._loss_S = torch.zeros(_SHARES, dtype=torch.float64)

    def judge(self, logits_B: Tensor, trees_B: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> Tensor:
        """The weight after these rows, shape ()."""
        mixed_SB = torch.lerp(logits_B, trees_B, self._shares_S[:, None])
        loss_SB = F.binary_cross_entropy_with_logits(
            mixed_SB, labels_B.expand_as(mixed_SB), weights_B, reduction="none"
        )
        self._loss_S = self._loss_S * 0.5 ** (len(labels_B) / _SHARE_HALF_LIFE) + loss_SB.double().sum(1)
        return self._shares_S[self._loss_S.argmin()]

    def snapshot(self) -> list[float]:
        """The loss of each weight."""
        losses: list[float] = self._loss_S.tolist()
        return losses

    def restore(self, losses: list[float]) -> None:
        """Return to the state of `snapshot`."""
        self._loss_S = torch.tensor(losses, dtype=torch.float64)


class TreeWindow:
    """The newest rows learned from, what trees weigh, and when the next fit is due: the first after `first_rows`, then
    whenever twice as many rows came as the fit before had.

    Rows have no name of user or item, so they stay when a user is forgotten, as does what was learned from them.
    """

    def __init__(self, config: TreesConfig, width: int, *, seed: int) -> None:
        self.config = config
        self._seed = seed
        self._numbers_WX = np.zeros((config.rows, width), np.float32)
        self._label_W = np.zeros(config.rows, np.float32)
        self._weight_W = np.zeros(config.rows, np.float32)
        self._seen = 0
        self._fit_at = config.first_rows
        self.fits, self.fits_missed = 0, 0
        """Fits of this process, made, and due but with rows of one label only."""
        self.share = TreeShare(config.share)
        self._changed = ChangedRows()

    def add(
        self, numbers_BX: NDArray[np.float32], label_B: NDArray[np.float32], weight_B: NDArray[np.float32] | None
    ) -> None:
        """Keep rows that were learned from, in order."""
        places_B = np.arange(self._seen, self._seen + len(label_B)) % len(self._label_W)
        self._numbers_WX[places_B], self._label_W[places_B] = numbers_BX, label_B
        self._weight_W[places_B] = 1.0 if weight_B is None else weight_B
        self._changed.touch(places_B)
        self._seen += len(label_B)

    def fit_if_due(self) -> Forest | None:
        """Trees of the window where they are due and can be fitted."""
        if self._seen < self._fit_at:
            return None
        held = min(self._seen, len(self._label_W))
        self._fit_at = self._seen + 2 * held
        order_W = np.arange(self._seen - held, self._seen) % len(self._label_W)
        order_W = order_W[self._weight_W[order_W] > 0]
        forest = fit_trees(
            self.config, self._numbers_WX[order_W], self._label_W[order_W], self._weight_W[order_W], seed=self._seed
        )
        self.fits += forest is not None
        self.fits_missed += forest is None
        return forest

    def snapshot(self) -> State:
        """The rows, and when the next fit is due."""
        state = State(values={"seen": self._seen, "fit_at": self._fit_at, "seed": self._seed})
        state.values["share"] = self.share.snapshot()
        state.put_table("rows.", Table(min(self._seen, len(self._label_W)), self._changed, self._copied))
        return state

    def _copied(self, places: NDArray[np.int64]) -> Callable[[slice], State]:
        return copied_rows({"numbers": self._numbers_WX, "label": self._label_W, "weight": self._weight_W}, places)

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if it is of another width or a longer window."""
        numbers = state.arrays["rows.numbers"]
        if numbers.shape[1] != self._numbers_WX.shape[1] or len(numbers) > len(self._numbers_WX):
            raise ValueError(f"rows for trees of shape {numbers.shape} do not fit {self._numbers_WX.shape}")
        self._seen, self._fit_at, self._seed = (state.values[name] for name in ("seen", "fit_at", "seed"))
        self.share.restore(state.values["share"])
        if len(numbers) != min(self._seen, len(self._label_W)):
            raise ValueError(f"{len(numbers)} rows for trees of {self._seen}: the window has another length")
        self._numbers_WX[: len(numbers)] = numbers
        self._label_W[: len(numbers)] = state.arrays["rows.label"]
        self._weight_W[: len(numbers)] = state.arrays["rows.weight"]
        self._changed = ChangedRows()
