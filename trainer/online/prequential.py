"""Running prequential metrics over the newest rows, for manifests and dashboards."""

from __future__ import annotations

from collections import deque

import numpy as np

from trainer.metrics import ScoredRows, log_loss, user_auc
from trainer.state import State, whole_numbers

_COLUMNS = ("occurred_at", "label", "age_seconds", "catalogue", "retaken")


class RecentScores:
    """The newest tables of scores that together hold at least `rows` rows, if there were so many."""

    def __init__(self, rows: int = 20_000) -> None:
        self._rows = rows
        self._tables: deque[ScoredRows] = deque()
        self._count = 0

    def add(self, table: ScoredRows) -> None:
        """Add a table; the oldest ones leave."""
        self._tables.append(table)
        self._count += len(table)
        while self._count - len(self._tables[0]) >= self._rows:
            self._count -= len(self._tables.popleft())

    def metrics(self) -> dict[str, float | None]:
        """`<variant>_gauc` and `<variant>_logloss`, without re-takes; None where they cannot be computed."""
        if not self._tables:
            return {}
        rows = ScoredRows.concatenate(list(self._tables))
        first = ~rows.retaken
        _, users = np.unique(rows.user[first], return_inverse=True)
        metrics: dict[str, float | None] = {}
        for name, scores in rows.scores.items():
            gauc = user_auc(users.reshape(-1), rows.label[first], scores[first]).weighted
            metrics[f"{name}_gauc"] = None if np.isnan(gauc) else gauc
            metrics[f"{name}_logloss"] = log_loss(rows.label[first], scores[first]) if first.any() else None
        return metrics

    def forget(self, user_id: str) -> None:
        """Remove a user's rows."""
        kept = [_rows_of(table, table.user != user_id) for table in self._tables]
        self._tables = deque(table for table in kept if len(table))
        self._count = sum(map(len, self._tables))

    def snapshot(self) -> State:
        """The tables as columns, and how long each is."""
        tables = list(self._tables)
        state = State(
            {"lengths": whole_numbers(map(len, tables))}, {"variants": list(tables[0].scores) if tables else []}
        )
        if tables:
            state.later(lambda: _packed(tables))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if tables and rows do not fit."""
        self._tables.clear()
        lengths = state.arrays["lengths"].tolist()
        if lengths and (min(lengths) < 0 or any(len(state.arrays[name]) != sum(lengths) for name in _COLUMNS)):
            raise ValueError(f"tables of {sum(lengths)} scored rows do not fit their columns")
        self._count = sum(lengths)
        if not lengths:
            return
        rows = ScoredRows(
            user=np.array(state.texts("user")),
            item=np.array(state.texts("item")),
            **{name: state.arrays[name] for name in _COLUMNS},
            scores={variant: state.arrays[f"scores/{variant}"] for variant in state.values["variants"]},
        )
        end = 0
        for length in lengths:
            start, end = end, end + length
            self._tables.append(_rows_of(rows, np.arange(start, end)))


def _packed(tables: list[ScoredRows]) -> State:
    rows = ScoredRows.concatenate(tables)
    state = State({name: getattr(rows, name) for name in _COLUMNS})
    state.put_texts("user", rows.user.tolist())
    state.put_texts("item", rows.item.tolist())
    state.arrays.update({f"scores/{variant}": scores for variant, scores in rows.scores.items()})
    return state


def _rows_of(rows: ScoredRows, chosen: np.ndarray) -> ScoredRows:
    return ScoredRows(
        **{name: getattr(rows, name)[chosen] for name in ("user", "item", *_COLUMNS)},
        scores={variant: scores[chosen] for variant, scores in rows.scores.items()},
    )
