"""The shuffled-vector control: the same model on the same rows, with every item's vector swapped for another's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.samples.catalogue import Catalogue
from trainer.state import State, whole_numbers


class Shuffle:
    """Permutes vectors among the items that rows have named so far, in the order in which rows name them.

    Each newcomer swaps with a random earlier item (inside-out Fisher-Yates), so the assignment is a uniformly random
    permutation at every moment and an item's wrong vector stays nearly as stable as its right one would. Of more than
    `most_items` the one met first leaves, and the newcomer takes its place in the permutation.
    """

    def __init__(self, rng: np.random.Generator, *, most_items: int = 100_000) -> None:
        self._rng = rng
        self._place: dict[int, int] = {}
        self._met: list[int] = []
        self._other = np.zeros(1024, np.int64)
        self._most = most_items
        self._next_to_leave = 0

    def items(self) -> Iterator[int]:
        """Numbers of the items among which vectors are permuted."""
        return iter(self._met)

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
            {"rng": self._rng.bit_generator.state, "next_to_leave": self._next_to_leave},
        )

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        self._met = state.arrays["met"].tolist()
        self._place = {number: place for place, number in enumerate(self._met)}
        while len(self._other) <= len(self._met):
            self._other = np.concatenate([self._other, np.zeros(len(self._other), np.int64)])
        self._other[: len(self._met)] = state.arrays["other"]
        self._rng.bit_generator.state = state.values["rng"]
        self._next_to_leave = state.values.get("next_to_leave", 0)

    def _partner(self, number: int) -> int:
        place = self._place.get(number)
        return 0 if place is None else int(self._other[place])

    def _meet(self, number: int) -> None:
        place = len(self._met)
        if place >= self._most:
            self._replace(self._next_to_leave % place, number)
            return
        self._place[number] = place
        self._met.append(number)
        if place >= len(self._other):
            self._other = np.concatenate([self._other, np.zeros(len(self._other), np.int64)])
        swapped = int(self._rng.integers(place + 1))
        self._other[place] = self._other[swapped]
        self._other[swapped] = number  # swapped == place: the newcomer keeps its own vector for now

    def _replace(self, place: int, number: int) -> None:
        oldest, self._met[place] = self._met[place], number
        del self._place[oldest]
        self._place[number] = place
        self._other[: len(self._met)][self._other[: len(self._met)] == oldest] = number
        self._next_to_leave = place + 1
