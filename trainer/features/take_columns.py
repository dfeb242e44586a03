"""Takes as columns, as the state of features counts them. Letters: T takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TakeColumns:
    """Takes to add, in any order; users and events by a 63-bit hash of their ids."""

    user_T: NDArray[np.int64]
    item_T: NDArray[np.int64]
    """Item numbers."""
    second_T: NDArray[np.int64]
    event_T: NDArray[np.int64]
    """The takes' own events, by which drawn exposures name them."""
    announces_T: NDArray[np.bool_]
    """The item's time of publication was inferred from this take, so it is counted nowhere."""
    query_T: NDArray[np.int64] | None = None
    """Numbers of the searches that led to the takes, 0 for none; None where searches are not read."""
    trigger_T: NDArray[np.int64] | None = None
    """Numbers of the items that were looked at just before, likewise."""

    def __len__(self) -> int:
        return len(self.user_T)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> TakeColumns:
        """These takes, in this order."""
        return TakeColumns(
            self.user_T[rows],
            self.item_T[rows],
            self.second_T[rows],
            self.event_T[rows],
            self.announces_T[rows],
            None if self.query_T is None else self.query_T[rows],
            None if self.trigger_T is None else self.trigger_T[rows],
        )
