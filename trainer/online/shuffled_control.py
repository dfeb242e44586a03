"""The shuffled-vector control: the same model on the same rows, with every item's vector swapped for another's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.samples.catalogue import Catalogue
from trainer.state import State, whole_numbers


class Shuffle:
    """Permutes vectors among the items that rows have named so far, in the order in which rows name them.

    Each newcomer swaps with a random earlier item (inside-out Fisher-Yates), so the assignment is a uniformly random
    permutation at every moment and an item's wrong vector stays nearly as stable as its right one would.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._place: dict[int, int] = {}
        self._met: list[int] = []
        self._other = np.zeros(1024, np.int64)

    def vectors(self, items_U: NDArray[np.int64], catalogue: Catalogue) -> dict[str, Tensor]:
        """Vectors (U, V) and their mask (U,) for the distinct items of a batch, each taken from another item."""
        for number in items_U.tolist():
            if number and number not in self._place and catalogue.has_vector(number):
                self._meet(number)
        others = np.array([self._partner(number) for number in items_U.tolist()], np.int64)
        return {
            "vectors_UV": torch.from_numpy(catalogue.vectors(others)),
            "has_vector_U": torch.from_numpy(catalogue.vector_mask(others)),
        }

    def snapshot(self) -> State:
        """The permutation and the generator."""
        return State(
            {"met": whole_numbers(self._met), "other": self._other[: len(self._met)].copy()},
            {"rng": self._rng.bit_generator.state},
        )

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        self._met = state.arrays["met"].tolist()
        self._place = {number: place for place, number in enumerate(self._met)}
        while len(self._other) <= len(self._met):
            self._other = np.concatenate([self._other, np.zeros(len(self._other), np.int64)])
        self._other[: len(self._met)] = state.arrays["other"]
        self._rng.bit_generator.state = state.values["rng"]

    def _partner(self, number: int) -> int:
        place = self._place.get(number)
        return 0 if place is None else int(self._other[place])

    def _meet(self, number: int) -> None:
        place = len(self._met)
        self._place[number] = place
        self._met.append(number)
        if place >= len(self._other):
            self._other = np.concatenate([self._other, np.zeros(len(self._other), np.int64)])
        swapped = int(self._rng.integers(place + 1))
        self._other[place] = self._other[swapped]
        self._other[swapped] = number  # swapped == place: the newcomer keeps its own vector for now
