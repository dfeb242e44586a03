"""The histories of the label join, and their form in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainer.samples.histories import place_of
from trainer.samples.rows import Take
from trainer.state import State, ragged, whole_numbers


class UserHistory(NamedTuple):
    """The newest takes of a user, the longest ago first."""

    user: str
    items: tuple[int, ...] = ()
    seconds: tuple[int, ...] = ()
    used: int = -1
    """Running number of its newest take."""

    def with_take(self, take: Take, number: int, *, length: int, once: bool) -> UserHistory:
        """With a take, the newest so far; `once`: it replaces the item's former one."""
        items, seconds = list(self.items), list(self.seconds)
        _, former = place_of(items, seconds, take.item, take.second) if once else (None, None)
        if former is not None:
            del items[former], seconds[former]
        newest = (*items, take.item)[-length:], (*seconds, take.second)[-length:]
        return UserHistory(self.user, *newest, number)

    def only(self, places: list[int]) -> UserHistory:
        """With these places alone."""
        items, seconds = tuple(self.items[at] for at in places), tuple(self.seconds[at] for at in places)
        return self._replace(items=items, seconds=seconds)


_FREE = UserHistory("")


def packed_histories(rows: Sequence[UserHistory | None]) -> State:
    """The columns of a table of histories, for `Slots.table`; a free row has no user."""
    kept = [row or _FREE for row in rows]
    state = State({"used": whole_numbers(row.used for row in kept)})
    state.put_texts("users", (row.user for row in kept))
    state.add(ragged("items", [row.items for row in kept]))
    state.add(ragged("seconds", [row.seconds for row in kept]))
    return state
