"""Tables whose rows are kept in snapshots as they change: one with free rows, and the way back from the pieces."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.changed_rows import ChangedRows
from trainer.state import Arrays, State, Table

V = TypeVar("V")


class Slots(Generic[V]):
    """Values that come and go, each in a row of its own; a row that is free has None. Values are never changed."""

    def __init__(self, rows: Sequence[V | None] = ()) -> None:
        self._rows: list[V | None] = list(rows)
        self._free = [row for row, value in enumerate(rows) if value is None]  # the lowest is taken first: a heap
        self.changed = ChangedRows()

    def __getitem__(self, row: int) -> V:
        value = self._rows[row]
        assert value is not None, f"row {row} is free"
        return value

    def add(self, value: V) -> int:
        """Put a value into a free row; returns its number."""
        if self._free:
            row = heapq.heappop(self._free)
        else:
            row = len(self._rows)
            self._rows.append(None)
        self[row] = value
        return row

    def __setitem__(self, row: int, value: V) -> None:
        self._rows[row] = value
        self.changed.touch(row)

    def pop(self, row: int) -> V:
        """Free a row; returns what was in it."""
        value = self[row]
        self._rows[row] = None
        self.changed.touch(row)
        heapq.heappush(self._free, row)
        return value

    def clear(self) -> None:
        """Remove all rows."""
        self._rows, self._free = [], []

    def table(self, pack: Callable[[list[V | None]], State], *, user_column: str = "") -> Table:
        """The rows for a snapshot. `pack` makes columns of some of them in another thread; None is a free row."""

        def copied(numbers: NDArray[np.int64]) -> Callable[[slice], State]:
            rows = self._rows
            chosen = rows.copy() if len(numbers) == len(rows) else [rows[number] for number in numbers.tolist()]
            return lambda part: pack(chosen[part])

        return Table(len(self._rows), self.changed, copied, user_column)


class Fold:
    """A table from pieces of some rows each, the oldest first: of two with the same row the later counts."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._filled = np.zeros(count, bool)
        self._fixed: Arrays = {}
        self._empty: Arrays = {}
        self._lists: dict[str, list[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64]]]] = {}

    def add(self, numbers: NDArray[np.int64], columns: Arrays) -> None:
        """Add a piece. Raises `ValueError` or `LookupError` where its columns do not fit its rows."""
        inside = numbers < self._count  # the table may have become shorter
        if len(numbers) and (numbers[0] < 0 or (np.diff(numbers) <= 0).any()):
            raise ValueError("rows of a piece are not ascending")
        for name, column in columns.items():
            if name.endswith((".bytes", ".flat")):
                continue
            if len(column) != len(numbers):
                raise ValueError(f"{name!r} has {len(column)} values for {len(numbers)} rows")
            if name.endswith(".ends"):
                flat = columns.get(name[:-5] + ".bytes", columns.get(name[:-5] + ".flat"))
                if flat is None or (column[-1] if len(column) else 0) != len(flat) or (np.diff(column) < 0).any():
                    raise ValueError(f"{name!r} does not fit its places")
                self._lists.setdefault(name[:-5], []).append((numbers, flat, column))
                continue
            if not len(numbers):
                self._empty[name] = column  # the shape of a row may not be known before the first
                continue
            if name not in self._fixed:
                self._fixed[name] = np.zeros((self._count, *column.shape[1:]), column.dtype)
            self._fixed[name][numbers[inside]] = column[inside]
        self._filled[numbers[inside]] = True

    def arrays(self) -> Arrays:
        """The columns of the whole table. Raises `ValueError` if rows are missing."""
        if not self._filled.all():
            raise ValueError(f"{np.count_nonzero(~self._filled)} of {self._count} rows are in no piece")
        found = self._fixed | ({} if self._count else self._empty)
        for name, pieces in self._lists.items():
            flat, ends = self._joined(pieces)
            found[f"{name}.ends"] = ends
            found[f"{name}.{'bytes' if flat.dtype == np.uint8 else 'flat'}"] = flat
        return found

    def _joined(
        self, pieces: list[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64]]]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        starts, lengths = np.zeros(self._count, np.int64), np.zeros(self._count, np.int64)
        before = 0
        for numbers, flat, ends in pieces:
            inside = numbers < self._count
            sizes = np.diff(ends, prepend=0)
            starts[numbers[inside]] = (before + ends - sizes)[inside]
            lengths[numbers[inside]] = sizes[inside]
            before += len(flat)
        all_flat = np.concatenate([flat for _, flat, _ in pieces])
        joined_ends = np.cumsum(lengths)
        place = np.arange(int(joined_ends[-1]) if self._count else 0)
        place += np.repeat(starts - (joined_ends - lengths), lengths)
        return all_flat[place], joined_ends


def rows_without(columns: Arrays, column: str, texts: Collection[str]) -> Arrays:
    """The columns of a piece without the rows whose text in `column` is one of these."""
    names = State({key: columns[key] for key in (f"{column}.bytes", f"{column}.ends")}).texts(column)
    kept = np.array([name not in texts for name in names], bool)
    found: Arrays = {}
    for name, array in columns.items():
        if name.endswith((".bytes", ".flat")):
            found[name] = array[np.repeat(kept, np.diff(columns[name.rpartition(".")[0] + ".ends"], prepend=0))]
        elif name.endswith(".ends"):
            found[name] = np.cumsum(np.diff(array, prepend=0)[kept])
        else:
            found[name] = array[kept]
    return found
