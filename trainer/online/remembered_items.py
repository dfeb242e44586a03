"""Items that rows do not wait for, as many as fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class RememberedItems:
    """The newest `most` of some item ids. Forgetting one costs a wait for its vector, and changes no row."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: dict[str, None] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    def add(self, item_id: str) -> None:
        """Add an id as the newest."""
        self._items.pop(item_id, None)
        self._items[item_id] = None
        if len(self._items) > self._most:
            del self._items[next(iter(self._items))]

    def discard(self, item_id: str) -> None:
        """Remove an id, if it is there."""
        self._items.pop(item_id, None)

    def restore(self, items: Iterable[str]) -> None:
        """Hold these ids, oldest first."""
        self._items.clear()
        for item_id in items:
            self.add(item_id)
