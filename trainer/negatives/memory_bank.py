"""Takes stored for negatives: the current window (space) and a bank of earlier ones (time)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.samples.rows import Take


class TakeBank:
    """A ring of takes, bounded by count, by event time and by steps of training.

    By default the ring stores item numbers, not projected vectors: each use projects the items' vectors with the
    current weights, so its rows do not go stale as those of a cross-batch memory do (arXiv 1912.06798). Where the
    towers themselves are trained that would cost a whole pass, and the ring stores the output of a momentum encoder
    (`vector_width` > 0).
    """

    def __init__(
        self, capacity: int, *, max_age_seconds: float, max_age_steps: int | None = None, vector_width: int = 0
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, it must be at least 1")
        self._items = np.zeros(capacity, np.int64)
        self._seconds = np.zeros(capacity, np.int64)
        self._steps = np.zeros(capacity, np.int64)
        self._vectors = np.zeros((capacity, vector_width), np.float32)
        self._next = 0
        self._count = 0
        self._max_age = max_age_seconds
        self._max_age_steps = max_age_steps

    def __len__(self) -> int:
        return self._count

    def add(self, take: Take, *, step: int = 0, vector: NDArray[np.float32] | None = None) -> None:
        """Add one take, in the order of training; a full ring overwrites its oldest."""
        capacity = len(self._items)
        self._items[self._next] = take.item
        self._seconds[self._next] = take.second
        self._steps[self._next] = step
        if vector is not None:
            self._vectors[self._next] = vector
        self._next = (self._next + 1) % capacity
        self._count = min(self._count + 1, capacity)

    def items(self, now: int, *, step: int = 0) -> NDArray[np.int64]:
        """Item numbers of the takes within the age limits at event time `now` and at step `step`, oldest first."""
        return self._items[self._young(now, step)]

    def all_items(self) -> NDArray[np.int64]:
        """Item numbers of all takes, young or not."""
        return self._items[: self._count]

    def newest_rows(self, items: NDArray[np.int64], *, step: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """For items in the ring: the vector each was last stored with (n, width), and steps since then (n,)."""
        capacity = len(self._items)
        newest_first = (self._next - 1 - np.arange(self._count)) % capacity
        distinct, first = np.unique(self._items[newest_first], return_index=True)
        place = newest_first[first[np.searchsorted(distinct, items)]]
        return self._vectors[place], step - self._steps[place]

    def snapshot(self) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
        """Everything that `restore` needs, as arrays."""
        place = np.array([self._next, self._count], np.int64)
        return {
            "items": self._items.copy(),
            "seconds": self._seconds.copy(),
            "steps": self._steps.copy(),
            "vectors": self._vectors.copy(),
            "place": place,
        }

    def restore(self, state: Mapping[str, NDArray[np.int64] | NDArray[np.float32]]) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if its ring has another size."""
        for name, own in (
            ("items", self._items),
            ("seconds", self._seconds),
            ("steps", self._steps),
            ("vectors", self._vectors),
        ):
            if state[name].shape != own.shape:
                raise ValueError(f"the bank's {name} have shape {state[name].shape}, expected {own.shape}")
            own[...] = state[name]
        self._next, self._count = (int(value) for value in state["place"])

    def _young(self, now: int, step: int) -> NDArray[np.int64]:
        capacity = len(self._items)
        order = (self._next - self._count + np.arange(self._count)) % capacity
        young = self._seconds[order] >= now - self._max_age
        if self._max_age_steps is not None:
            young &= self._steps[order] >= step - self._max_age_steps
        return np.asarray(order[young])

    def purge(self, item: int) -> int:
        """Remove every row of a deleted item; returns how many there were."""
        capacity = len(self._items)
        order = (self._next - self._count + np.arange(self._count)) % capacity
        kept = order[self._items[order] != item]
        removed = self._count - len(kept)
        if removed:
            for column in (self._items, self._seconds, self._steps, self._vectors):
                column[: len(kept)] = column[kept]
            self._next, self._count = len(kept) % capacity, len(kept)
        return removed


class SpaceTimeMemory:
    """The source of space-time negatives: a window of all users' latest takes, and a bank of earlier ones.

    A take enters the window and moves to the bank when it is `window_seconds` old or the window is full.
    """

    def __init__(
        self,
        *,
        window_seconds: float,
        window_takes: int,
        bank_takes: int,
        bank_seconds: float,
        bank_steps: int | None = None,
        vector_width: int = 0,
    ) -> None:
        self._window: deque[Take] = deque()
        self._window_seconds = window_seconds
        self._window_takes = window_takes
        self.bank = TakeBank(
            bank_takes, max_age_seconds=bank_seconds, max_age_steps=bank_steps, vector_width=vector_width
        )
        self.step = 0
        """The training step that rows are marked with; set by trainers that bound the bank by steps."""

    def add(self, take: Take) -> None:
        """Add one take, in event-time order."""
        self._window.append(take)
        oldest = take.second - self._window_seconds
        while len(self._window) > self._window_takes or self._window[0].second < oldest:
            self.bank.add(self._window.popleft(), step=self.step)

    def window_items(self) -> NDArray[np.int64]:
        """Item numbers of the takes in the window, oldest first."""
        return np.fromiter((take.item for take in self._window), np.int64, len(self._window))

    def bank_items(self, now: int) -> NDArray[np.int64]:
        """Item numbers of the takes in the bank within its age limits at event time `now`."""
        return self.bank.items(now, step=self.step)

    def snapshot(self) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
        """Window, bank and step, as arrays."""
        window = np.array([(take.item, take.second) for take in self._window], np.int64).reshape(-1, 2)
        return {"window": window, "step": np.array([self.step], np.int64), **self.bank.snapshot()}

    def restore(self, state: Mapping[str, NDArray[np.int64] | NDArray[np.float32]]) -> None:
        """Return to the state of `snapshot`, which does not store the users of takes."""
        self._window = deque(Take(int(second), "", int(item)) for item, second in state["window"].tolist())
        self.step = int(state["step"][0])
        self.bank.restore(state)

    def items(self) -> Iterator[int]:
        """Item numbers of all takes in window and bank."""
        yield from (take.item for take in self._window)
        yield from self.bank.all_items().tolist()

    def purge(self, item: int) -> None:
        """Remove a deleted item."""
        self._window = deque(take for take in self._window if take.item != item)
        self.bank.purge(item)
