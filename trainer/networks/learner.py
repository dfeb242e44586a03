"""One learner: a CiUBM, its optimisers, and the step that scores a batch and then trains on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.changed_rows import ChangedRows
from trainer.networks.ciubm import DENSE_FEATURES, CiUBM, CtrBatch, reached
from trainer.networks.collate import ContrastiveBatch, KindTargets
from trainer.networks.config import CiUBMConfig, LearnerConfig
from trainer.networks.losses import NonFiniteLoss, fake_negative_weights, info_nce, log_reached, outcome_loss
from trainer.networks.row_adam import RowAdam
from trainer.networks.trees import TreesReport, TreeWindow
from trainer.state import State, Table


@dataclass(frozen=True)
class LearnReport:
    """Result of one step of one learner."""

    probabilities_B: NDArray[np.float64]
    """Predictions before training on these rows."""
    kinds_BK: NDArray[np.float64]
    """Those of the outputs of further kinds."""
    loss: float
    contrastive_loss: float | None


_IDS = "id_table.embedding.weight"
_JUDGED_EVERY = 8
"""Steps between two looks at what trees should weigh; each costs a forward pass."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def forget_rows(optimiser: torch.optim.Optimizer, rows_N: Tensor) -> None:
    """Clear the momentum of rows that were reassigned to other ids."""
    for state in optimiser.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][rows_N] = 0.0


def _copied(tensor: Tensor) -> NDArray[Any]:
    copied: NDArray[Any] = tensor.detach().cpu().numpy().copy()
    return copied


class Learner:
    """A model with its optimisers. Only `step` and `restore` change it."""

    def __init__(
        self,
        model_config: CiUBMConfig,
        config: LearnerConfig,
        *,
        vector_width: int,
        seed: int,
        dense_width: int = DENSE_FEATURES,
    ) -> None:
        self.config = config
        self.model = CiUBM(model_config, vector_width=vector_width, seed=seed, dense_width=dense_width)
        apart = ("id_table", "interest")
        dense = [p for name, p in self.model.named_parameters() if p.requires_grad and not name.startswith(apart)]
        self._dense_parameters: list[Tensor] = [*dense]
        # the model as releases have it: dense weights averaged, all else the same
        self._averaged = (
            CiUBM(model_config, vector_width=vector_width, seed=seed, dense_width=dense_width)
            .requires_grad_(False)
            .eval()
        )
        self._averaged.id_table = self.model.id_table
        if model_config.trees.count:
            self._averaged.trees = self.model.trees
        self._interest: torch.optim.Optimizer | None = None
        if model_config.uses_content:
            self._averaged.interest = self.model.interest
            self._interest = torch.optim.AdamW(
                self.model.interest.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
            )
        names = [name for name, one in self.model.named_parameters() if any(one is other for other in dense)]
        self._average: list[Tensor] = [self._averaged.get_parameter(name) for name in names]
        self._steps = 0
        self._dense = torch.optim.AdamW(dense, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self._ids = self.model.id_table.embedding.weight
        self._sparse = RowAdam([self._ids], lr=config.id_learning_rate)
        self._changed = ChangedRows()
        trees = model_config.trees
        self._tree_rows = TreeWindow(trees, self.model.numbers_width, seed=seed) if trees.count else None

    def step(
        self,
        batch: CtrBatch,
        labels_B: Tensor,
        contrastive: ContrastiveBatch | None,
        *,
        in_time: Sequence[float] = (),
        weights_B: Tensor | None = None,
        kinds: KindTargets | None = None,
    ) -> LearnReport:
        """Score the batch with the current weights, then train on it. Raises `NonFiniteLoss` before any weight changes.

        `in_time` is the share of takes that arrive before their impression counts as not taken, and then that of each
        further kind, 1 by default; `weights_B` are weights of the rows in the click loss, 1 by default. A model with
        further kinds needs their targets.
        """
        model, config = self.model, self.config
        logits_B, numbers_BX, steps_BK = model.network(batch)
        with torch.no_grad():
            served_B = model.served(logits_B.detach(), numbers_BX)
        if in_time and in_time[0] != 1:
            late_B = fake_negative_weights(torch.sigmoid(logits_B), labels_B, in_time[0])
            weights_B = late_B if weights_B is None else weights_B * late_B
        loss = F.binary_cross_entropy_with_logits(logits_B, labels_B, weights_B)
        kinds_loss = None if kinds is None else self._kinds_loss(served_B, steps_BK, kinds, in_time[1:])
        contrastive_loss = None if contrastive is None else self._contrastive(batch, contrastive)
        parts = (("loss", loss), ("loss of further kinds", kinds_loss), ("contrastive term", contrastive_loss))
        for name, one in parts:
            if one is not None and not torch.isfinite(one):
                raise NonFiniteLoss(f"{name} is {one.item()} on a batch of {len(labels_B)} rows")
        self._judge_trees(batch, numbers_BX, labels_B, weights_B)
        self._dense.zero_grad(set_to_none=True)
        self._sparse.zero_grad(set_to_none=True)
        (loss if kinds_loss is None else loss + kinds_loss).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._dense_parameters, config.max_gradient_norm)
        self._dense.step()
        self._sparse.step()
        if contrastive_loss is not None and self._interest is not None:
            self._interest.zero_grad(set_to_none=True)
            contrastive_loss.backward()  # type: ignore[no-untyped-call]
            self._interest.step()
        admitted_N = model.id_table.admit(batch.hashes_U2)
        forget_rows(self._sparse, admitted_N)
        self._changed.touch(admitted_N.numpy())
        if self._ids.grad is not None:
            self._changed.touch(self._ids.grad._indices()[0].numpy())
        self._follow()
        if self._tree_rows is not None:
            self._tree_rows.add(numbers_BX.numpy(), labels_B.numpy(), None if weights_B is None else weights_B.numpy())
            if (forest := self._tree_rows.fit_if_due()) is not None:
                trees = model.trees
                trees.load(forest, float(trees.share) if trees.fitted else model.config.trees.share)
        return LearnReport(
            probabilities_B=torch.sigmoid(served_B.double()).numpy(),
            kinds_BK=reached(served_B, steps_BK.detach())[:, 1:].numpy(),
            loss=float(loss.detach()),
            contrastive_loss=None if contrastive_loss is None else float(contrastive_loss.detach()),
        )

    @torch.no_grad()
    def _judge_trees(self, batch: CtrBatch, numbers_BX: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> None:
        """Weigh the trees by what serves best beside averaged weights: those of the last step gain from any mean."""
        if self._tree_rows is None or not self.model.trees.fitted or self._steps % _JUDGED_EVERY:
            return
        logits_B, _, _ = self._averaged.network(batch)
        share = self._tree_rows.share.judge(logits_B, self.model.trees(numbers_BX), labels_B, weights_B)
        self.model.trees.share.copy_(share)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights, by more in the first steps: the initial weights are no part of it."""
        self._steps += 1
        half_life = self.config.average_steps
        kept = min(0.5 ** (1 / half_life), self._steps / (self._steps + 10)) if half_life else 0.0
        torch._foreach_lerp_(self._average, self._dense_parameters, 1 - kept)

    @property
    def trees(self) -> TreesReport | None:
        """The trees beside the network; None for a model without."""
        if self._tree_rows is None:
            return None
        trees = self.model.trees
        count = int(trees.value_TL.any(1).sum())
        return TreesReport(count, float(trees.share), self._tree_rows.fits, self._tree_rows.fits_missed)

    def released(self) -> dict[str, Tensor]:
        """A copy of the weights as a release has them: dense ones averaged over the last steps, and the id table."""
        return {name: tensor.detach().clone() for name, tensor in self._averaged.state_dict().items()}

    def snapshot(self) -> State:
        """Weights and state of the optimisers."""
        state = State(values={"dense": {}, "sparse": {}, "interest": {}, "steps": self._steps})
        for index, averaged in enumerate(self._average):
            state.arrays[f"average/{index}"] = _copied(averaged)
        for name, tensor in self.model.state_dict().items():
            if name != _IDS:
                state.arrays[f"model/{name}"] = _copied(tensor)
        for which, optimiser in self._optimisers():
            for index, kept in optimiser.state_dict()["state"].items():
                numbers = state.values[which].setdefault(str(index), {})
                for name, value in kept.items():
                    if optimiser is self._sparse and name in _MOMENTS:
                        continue  # in the table
                    if isinstance(value, Tensor):
                        state.small_arrays[f"{which}/{index}/{name}"] = _copied(value)
                    else:
                        numbers[name] = value
        state.put_table("", Table(len(self._ids), self._changed, self._copied_ids))
        if self._tree_rows is not None:
            state.put("trees", self._tree_rows.snapshot())
        return state

    def _copied_ids(self, numbers: NDArray[np.int64]) -> Callable[[slice], State]:
        rows = torch.from_numpy(numbers)
        state = self._sparse.state.get(self._ids) or dict.fromkeys(_MOMENTS, torch.zeros_like(self._ids))
        tensors = {f"model/{_IDS}": self._ids} | {f"sparse/0/{name}": state[name] for name in _MOMENTS}
        columns = {name: tensor.detach()[rows].cpu().numpy() for name, tensor in tensors.items()}
        return lambda part: State({name: column[part] for name, column in columns.items()})

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if its model has another shape."""
        if self._tree_rows is not None:
            self._tree_rows.restore(state.part("trees"))
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in state.arrays.items()}
        model = {name.removeprefix("model/"): tensor for name, tensor in arrays.items() if name.startswith("model/")}
        try:
            self.model.load_weights(model)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit the model: {error}") from None
        self._steps = state.values["steps"]
        self._averaged.load_weights(model)
        for place, averaged in enumerate(self._average):
            averaged.copy_(arrays[f"average/{place}"])
        self._changed = ChangedRows()
        for which, optimiser in self._optimisers():
            kept: dict[int, dict[str, object]] = {int(i): dict(v) for i, v in state.values.get(which, {}).items()}
            for name, tensor in arrays.items():
                if name.startswith(f"{which}/"):
                    _, index, key = name.split("/")
                    if int(index) in kept:  # there are moments of ids before there are steps
                        kept[int(index)][key] = tensor
            optimiser.load_state_dict({"state": kept, "param_groups": optimiser.state_dict()["param_groups"]})

    def _optimisers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        own = [] if self._interest is None else [("interest", self._interest)]
        return [("dense", self._dense), ("sparse", self._sparse), *own]

    def _kinds_loss(self, served_B: Tensor, steps_BK: Tensor, kinds: KindTargets, in_time: Sequence[float]) -> Tensor:
        log_p_BK, weights_BK = log_reached(served_B, steps_BK), kinds.weights_BK
        if in_time:
            share_K = torch.tensor(in_time, dtype=torch.float32)
            weights_BK = weights_BK * fake_negative_weights(log_p_BK.exp(), kinds.labels_BK, share_K)
        return outcome_loss(log_p_BK, kinds.labels_BK, weights_BK)

    def _contrastive(self, batch: CtrBatch, contrastive: ContrastiveBatch) -> Tensor | None:
        """The term, which moves the interest space alone; None where it is off, or the model reads no content."""
        config, model = self.config, self.model
        if not config.contrastive or self._interest is None:
            return None

        def placed(items_X: Tensor) -> Tensor:
            return model.interest_space(batch.vectors_UV[items_X], batch.has_vector_U[items_X])

        return info_nce(
            model.anchor(batch, contrastive.rows_P),
            placed(contrastive.positives_P),
            placed(contrastive.candidates_K),
            contrastive.allowed_PK,
            temperature=config.temperature,
            positive_log_q_P=config.log_q_strength * contrastive.positive_log_q_P,
            candidate_log_q_K=config.log_q_strength * contrastive.candidate_log_q_K,
        )
