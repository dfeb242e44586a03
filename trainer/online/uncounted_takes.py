"""Takes that the features of the moment do not count yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from trainer.changed_rows import ChangedRows
from trainer.features.take_columns import TakeColumns
from trainer.samples.id_hashes import hash_columns
from trainer.samples.rows import Take
from trainer.state import State, Table, whole_numbers


class UncountedTakes:
    """Those of the second of the newest row, as rows of that second may still come, and those that no row followed.

    A step counts the takes before its newest second. Without rows there are no steps, so what waits is bounded: `due`.
    """

    def __init__(self) -> None:
        self._takes: list[Take] = []
        self._changed = ChangedRows()

    def __len__(self) -> int:
        return len(self._takes)

    def add(self, takes: Iterable[Take]) -> None:
        """Add whole seconds of takes, later than those before."""
        self._takes += takes

    def items(self) -> Iterator[int]:
        """Numbers of their items, searches and triggers."""
        return (number for take in self._takes for number in take.numbers)

    def due(self, most: int) -> int | None:
        """The second before which takes have to be counted now, as more than `most` wait; None if there is none.

        In whole seconds, and the same ones however many were added at once: what is counted together decides.
        """
        if len(self._takes) <= most:
            return None
        later = (take.second for take in islice(self._takes, most, None) if take.second > self._takes[0].second)
        return next(later, None)

    def pop(self, before: int) -> TakeColumns:
        """Take out those before a second, to be counted."""
        counted = [take for take in self._takes if take.second < before]
        self._takes = [take for take in self._takes if take.second >= before]
        return TakeColumns(
            hash_columns([take.user_id for take in counted])[:, 0],
            whole_numbers(take.item for take in counted),
            whole_numbers(take.second for take in counted),
            whole_numbers(take.event for take in counted),
            np.array([take.announces for take in counted], bool),
            whole_numbers(take.query for take in counted),
            whole_numbers(take.trigger for take in counted),
        )

    def forget(self, user_id: str) -> None:
        """Remove a user's takes."""
        self._takes = [take for take in self._takes if take.user_id != user_id]

    def snapshot(self) -> State:
        """All of them, as rows that name users: an erasure finds them in earlier snapshots."""
        self._changed.touch(slice(0, len(self._takes)))
        state = State()
        state.put_table("", Table(len(self._takes), self._changed, self._copied, user_column="user"))
        return state

    def _copied(self, rows: NDArray[np.int64]) -> Callable[[slice], State]:
        chosen = [self._takes[row] for row in rows.tolist()]
        return lambda part: _packed(chosen[part])

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        numbers, users = state.arrays["takes"], state.texts("user")
        numbers = np.pad(numbers, ((0, 0), (0, 6 - numbers.shape[1])))  # an earlier build knew no searches, no triggers
        held = zip(numbers.tolist(), users, strict=True)
        self._takes = [
            Take(at, user, item, event, bool(announces), *led_to)
            for (at, item, event, announces, *led_to), user in held
        ]
        self._changed = ChangedRows()


def _packed(takes: list[Take]) -> State:
    numbers = [(take.second, take.item, take.event, take.announces, take.query, take.trigger) for take in takes]
    state = State({"takes": np.array(numbers, np.int64).reshape(-1, 6)})
    state.put_texts("user", (take.user_id for take in takes))
    return state
