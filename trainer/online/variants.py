"""The models that learn side by side from the same batches: the real one, and those it is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import Collated, dense_width
from trainer.networks.learner import Learner
from trainer.networks.trees import TreesReport
from trainer.online.config import TrainerConfig
from trainer.online.shuffled_control import Shuffle
from trainer.samples.catalogue import Catalogue
from trainer.state import State

CIUBM, DIN, SHUFFLED = "ciubm", "din", "ciubm_shuffled"
VARIANTS = (CIUBM, DIN, SHUFFLED)
"""What can be trained side by side on the same rows: the model, its id-only form, and the shuffled-vector control."""


@dataclass(frozen=True)
class VariantsReport:
    """What one step of all variants saw, by variant."""

    probabilities: dict[str, NDArray[np.float64]]
    """(B,) predictions made before learning from these rows."""
    losses: dict[str, float]
    kinds_BK: NDArray[np.float64]
    """(B, K) those of the real model's further kinds."""


class Variants:
    """One learner a variant. `step` is the only verb that changes them; they do not see each other."""

    def __init__(self, config: TrainerConfig, names: Sequence[str], *, vector_width: int) -> None:
        """Raises `ValueError` if the real model is not among `names`, or if one of them is unknown."""
        unknown = set(names) - set(VARIANTS)
        if unknown or CIUBM not in names:
            raise ValueError(f"variants are {sorted(names)}, expected {CIUBM} and any of {DIN}, {SHUFFLED}")
        self._learners = {
            name: Learner(
                config.model.without_content() if name == DIN else config.model,
                config.learner,
                vector_width=vector_width,
                seed=config.seed,
                dense_width=dense_width(config.features),
            )
            for name in names
        }
        self._shuffle = Shuffle(np.random.default_rng(config.seed + 1)) if SHUFFLED in names else None
        self._torch_rng = _seeded(config) if config.model.draws_in_training else None

    @property
    def model(self) -> CiUBM:
        """The real model as it is now."""
        return self._learners[CIUBM].model

    @property
    def trees(self) -> TreesReport | None:
        """Its trees, where its configuration has some."""
        return self._learners[CIUBM].trees

    def released(self) -> dict[str, Tensor]:
        """A copy of the real model's weights as a release has them."""
        return self._learners[CIUBM].released()

    def step(self, collated: Collated, catalogue: Catalogue, *, in_time: Sequence[float]) -> VariantsReport:
        """Score the batch, then learn from it. Raises `NonFiniteLoss`; `in_time` is as `Learner.step` has it."""
        probabilities: dict[str, NDArray[np.float64]] = {}
        losses: dict[str, float] = {}
        kinds_BK = np.zeros((len(collated.labels_B), 0))
        for name, learner in self._learners.items():
            batch = collated.batch
            if name == SHUFFLED and self._shuffle is not None:
                batch = replace(batch, **self._shuffle.vectors(collated.items_U, catalogue))
            with self._own_torch_rng():
                report = learner.step(
                    batch,
                    collated.labels_B,
                    collated.contrastive,
                    in_time=in_time,
                    weights_B=collated.weights_B,
                    kinds=collated.kinds,
                )
            probabilities[name], losses[name] = report.probabilities_B, report.loss
            if name == CIUBM:
                kinds_BK = report.kinds_BK
                if report.contrastive_loss is not None:
                    losses["interest"] = report.contrastive_loss
        return VariantsReport(probabilities, losses, kinds_BK)

    def items(self) -> Iterator[int]:
        """Numbers of the items that the variants hold."""
        return iter(()) if self._shuffle is None else self._shuffle.items()

    def snapshot(self) -> State:
        """All learners, what was shuffled how, and the generator of dropout."""
        state = State(values={"learners": list(self._learners)})
        for name, learner in self._learners.items():
            state.put(f"learner-{name}", learner.snapshot())
        if self._shuffle is not None:
            state.put("shuffle", self._shuffle.snapshot())
        if self._torch_rng is not None:
            state.arrays["torch_rng"] = self._torch_rng.numpy().copy()
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if those were other variants, or other models."""
        if state.values["learners"] != list(self._learners):
            raise ValueError(f"the snapshot holds {state.values['learners']}, this trainer has {list(self._learners)}")
        if (self._torch_rng is not None) != ("torch_rng" in state.arrays):
            raise ValueError("the snapshot's model drew random numbers in training, or this one does")
        for name, learner in self._learners.items():
            learner.restore(state.part(f"learner-{name}"))
        if self._shuffle is not None:
            self._shuffle.restore(state.part("shuffle"))
        if self._torch_rng is not None:
            self._torch_rng = torch.from_numpy(np.array(state.arrays["torch_rng"]))

    @contextmanager
    def _own_torch_rng(self) -> Iterator[None]:
        """Dropout draws from a generator of this trainer alone; where nothing is dropped it costs nothing."""
        if self._torch_rng is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._torch_rng)
            yield
            self._torch_rng = torch.get_rng_state()


def _seeded(config: TrainerConfig) -> Tensor:
    return torch.Generator().manual_seed(config.seed).get_state()
