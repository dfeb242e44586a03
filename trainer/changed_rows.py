"""Which rows of a table a snapshot has to hold, given what an earlier one holds; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SWEEPS = 128
"""A sweep is over after at most so many snapshots, and with it the use of those before it."""


@dataclass(frozen=True, slots=True)
class RowsHeld:
    """What the snapshots up to one hold of a table."""

    count: int
    """Number of rows."""
    mark: int
    """The newest change that they hold, as its table counts."""
    lap: int = 0
    """How many times they went over the whole table."""
    row: int = 0
    """Row that comes next on the way over it."""

    @property
    def place(self) -> tuple[int, int]:
        """How far they went over the table."""
        return self.lap, self.row


class ChangedRows:
    """When each row of a table was last written: the owner says so with `touch`.

    A snapshot holds the rows written since another one. Beside them it holds the next ones on the way over the table,
    as many again and at least one of 128. What a snapshot holds is therefore held by later ones too as soon as they
    went once around, and its file is not needed any more.
    """

    def __init__(self) -> None:
        self._written = np.zeros(1024, np.int32)
        self._now = 1

    def touch(self, rows: int | NDArray[np.int64] | slice) -> None:
        """Note that these rows were written. A slice has a `stop`."""
        last = rows if isinstance(rows, int) else rows.stop - 1 if isinstance(rows, slice) else rows.max(initial=0)
        self._grow(int(last) + 1)
        self._written[rows] = self._now

    def select(self, count: int, held: RowsHeld | None) -> tuple[NDArray[np.int64], RowsHeld]:
        """Numbers of the rows that a snapshot has to hold now, ascending, and what is held with it.

        `count` is the number of rows now, `held` what is held already, if anything.
        """
        mark, self._now = self._now, self._now + 1
        if held is None:
            return np.arange(count), RowsHeld(count, mark)
        self._grow(count)
        wanted = self._written[:count] > held.mark
        wanted[held.count :] = True
        more = max(int(np.count_nonzero(wanted)), -(-count // _SWEEPS))
        stop = min(held.row + more, count)
        wanted[held.row : stop] = True
        place = (held.lap, stop) if stop < count else (held.lap + 1, 0)
        return np.flatnonzero(wanted), RowsHeld(count, mark, *place)

    def _grow(self, count: int) -> None:
        if count > len(self._written):
            more = np.zeros(max(count - len(self._written), len(self._written)), np.int32)
            self._written = np.concatenate([self._written, more])
