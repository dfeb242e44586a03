"""The kinds of takes that a set tells apart."""

from __future__ import annotations

from typing import Literal

from trainer.datasets.folder import DataSet

FURTHER: tuple[Literal["cart", "purchase"], ...] = ("cart", "purchase")


def kinds_told_apart(data: DataSet) -> tuple[Literal["cart", "purchase"], ...]:
    """The further kinds that a model of this set can have outputs of; none where all takes are of one kind."""
    rows = data.interactions
    if rows.kinds is None:
        return ()
    present = {kind.value for kind in set(rows.kinds[rows.taken].tolist())}
    return tuple(kind for kind in FURTHER if kind in present) if len(present) > 1 else ()
