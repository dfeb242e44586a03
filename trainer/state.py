"""What a part of the trainer is restored from: arrays and plain values by name. No code in it, so nothing to unpickle.

Every part returns from `snapshot()` a `State`, and returns to it with `restore(state)`. Parts nest by name; texts are
stored as one run of bytes with the place where each ends.

The thread that trains stands still while `snapshot` and `frozen` run. So they copy only what changes later on:

```text
arrays, values   copied at once: for what is small
later            made by another thread from objects that never change
put_table        rows of which `frozen` copies those that changed since an earlier snapshot: for what is large
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.changed_rows import ChangedRows, RowsHeld

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is now. It is still the part's own until `State.frozen`."""

    count: int
    """Number of rows; those that are not in use count."""
    changed: ChangedRows
    copied: Callable[[NDArray[np.int64]], Callable[[slice], State]]
    """Copies the rows of these numbers; what it returns makes arrays of a slice of them, in another thread."""
    user_column: str = ""
    """The column of texts that names users, if there is one."""


@dataclass(frozen=True, slots=True)
class TableCopy:
    """Rows of a table, all of them or those that changed since another snapshot."""

    numbers: NDArray[np.int64]
    """Ascending numbers of the rows."""
    held: RowsHeld
    """What a later snapshot has to know of this one."""
    columns: Callable[[slice], State]
    """Arrays of a slice of these rows."""
    user_column: str = ""


class State:
    """Arrays (any shape, numbers and booleans only) and values that JSON can carry."""

    def __init__(self, arrays: Arrays | None = None, values: dict[str, Any] | None = None) -> None:
        self._arrays: Arrays = {} if arrays is None else arrays
        self.values: dict[str, Any] = {} if values is None else values
        self.copies: dict[str, TableCopy] = {}
        """Rows of tables, by the head of their columns' names."""
        self._tables: dict[str, Table] = {}
        self._later: list[tuple[str, Callable[[], State]]] = []

    @property
    def arrays(self) -> Arrays:
        """All arrays by name, those of whole tables included. What was left for later is made now."""
        self.make_tables_arrays()
        return self.small_arrays

    @property
    def small_arrays(self) -> Arrays:
        """The arrays that are in no table. What was left for later is made now."""
        while self._later:
            prefix, make = self._later.pop()
            self._arrays.update({f"{prefix}{key}": array for key, array in make().arrays.items()})
        return self._arrays

    def make_tables_arrays(self) -> None:
        """Turn tables into arrays. Raises `ValueError` if they lack the rows that did not change."""
        self.copies |= self.frozen().copies
        self._tables.clear()
        for prefix, copy in self.copies.items():
            if len(copy.numbers) != copy.held.count:
                raise ValueError(f"{prefix!r} holds {len(copy.numbers)} of {copy.held.count} rows")
            self._arrays.update({f"{prefix}{key}": array for key, array in copy.columns(slice(None)).arrays.items()})
        self.copies.clear()

    def put(self, name: str, part: State) -> None:
        """Keep another part's state under a name."""
        self._take(f"{name}/", part)
        self.values[name] = part.values

    def add(self, part: State) -> None:
        """Keep another part's state beside what is here, under the names that it has there."""
        self._take("", part)
        self.values.update(part.values)

    def _take(self, prefix: str, part: State) -> None:
        self._arrays.update({f"{prefix}{key}": array for key, array in part._arrays.items()})
        self._tables.update({f"{prefix}{key}": table for key, table in part._tables.items()})
        self.copies.update({f"{prefix}{key}": copy for key, copy in part.copies.items()})
        self._later += [(f"{prefix}{inside}", make) for inside, make in part._later]

    def part(self, name: str) -> State:
        """The state that was put under a name. Raises `KeyError` if there is none."""
        prefix = f"{name}/"
        inside = {key.removeprefix(prefix): array for key, array in self.arrays.items() if key.startswith(prefix)}
        return State(inside, self.values[name])

    # ---- what costs the trainer's thread little ------------------------------------------------------------------

    def later(self, make: Callable[[], State]) -> None:
        """Keep the arrays that `make` returns; another thread calls it, so it reads only what never changes."""
        self._later.append(("", make))

    def put_table(self, name: str, table: Table) -> None:
        """Keep a table; the names of its columns begin with `name`."""
        self._tables[name] = table

    def frozen(self, since: Mapping[str, RowsHeld] | None = None) -> State:
        """The same, sharing no memory with what changes later. `since` is what an earlier snapshot holds, by table.

        Of those tables it has the rows that changed after it, and of the others all.
        """
        copy = State(self._arrays, self.values)
        copy._later = self._later
        copy.copies = self.copies.copy()
        for name, table in self._tables.items():
            numbers, held = table.changed.select(table.count, None if since is None else since.get(name))
            copy.copies[name] = TableCopy(numbers, held, table.copied(numbers), table.user_column)
        return copy

    # ---- lists ---------------------------------------------------------------------------------------------------

    def put_texts(self, name: str, texts: Iterable[str]) -> None:
        """Keep a list of texts."""
        self.put_bytes(name, (text.encode() for text in texts))

    def texts(self, name: str) -> list[str]:
        """A list of texts, as it was put."""
        return [piece.decode() for piece in self.pieces(name)]

    def put_bytes(self, name: str, pieces: Iterable[bytes]) -> None:
        """Keep a list of byte strings."""
        kept = list(pieces)
        self._arrays[f"{name}.bytes"] = np.frombuffer(b"".join(kept), np.uint8)
        self._arrays[f"{name}.ends"] = np.cumsum([len(piece) for piece in kept], dtype=np.int64)

    def pieces(self, name: str) -> list[bytes]:
        """A list of byte strings, as it was put. Raises `ValueError` if the places do not fit the bytes."""
        joined, ends = self.arrays[f"{name}.bytes"].tobytes(), self.arrays[f"{name}.ends"].tolist()
        return [joined[start:end] for start, end in _spans(name, ends, len(joined))]

    def put_optional_texts(self, name: str, texts: Iterable[str | None]) -> None:
        """Keep a list of texts of which some are missing."""
        kept = list(texts)
        self._arrays[f"{name}.given"] = np.array([text is not None for text in kept], bool)
        self.put_texts(name, (text or "" for text in kept))

    def optional_texts(self, name: str) -> list[str | None]:
        """A list of texts of which some are missing, as it was put."""
        given = self.arrays[f"{name}.given"].tolist()
        return [text if there else None for text, there in zip(self.texts(name), given, strict=True)]


def copied_rows(columns: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> Callable[[slice], State]:
    """For `Table.copied`: these rows of columns that are arrays."""
    copies = {name: column[rows] for name, column in columns.items()}
    return lambda part: State({name: column[part] for name, column in copies.items()})


def whole_numbers(values: Iterable[int]) -> NDArray[np.int64]:
    """Integers as an array, also where there are none."""
    return np.fromiter(values, np.int64)


def ragged(name: str, lists: Iterable[Sequence[int]]) -> State:
    """Lists of integers of different lengths as one array and the place where each ends."""
    kept = list(lists)
    ends = np.cumsum([len(one) for one in kept], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(kept), np.int64, int(ends[-1]) if kept else 0)
    return State({f"{name}.flat": flat, f"{name}.ends": ends})


def unragged(name: str, state: State) -> list[list[int]]:
    """What `ragged` was given. Raises `ValueError` if the places do not fit the numbers."""
    flat, ends = state.arrays[f"{name}.flat"].tolist(), state.arrays[f"{name}.ends"].tolist()
    return [flat[start:end] for start, end in _spans(name, ends, len(flat))]


def _spans(name: str, ends: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Where each piece begins and ends. One after the other and to the very end: none is held twice."""
    starts = [0, *ends[:-1]]
    spans = list(zip(starts, ends, strict=False))
    if (ends[-1] if ends else 0) != length or any(start > end for start, end in spans):
        raise ValueError(f"{name!r} does not fit its places")
    return spans
