"""Scores of prequential evaluation as parquet files, and the training rows as text."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import StoreUnavailable

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.metrics import ScoredRows

SCORES_FOLDER = "scores"


class ScoreFiles:
    """Prequential scores as `scores-<number of the first row>.parquet` in a folder; each complete at all times.

    Rows are numbered from the first one that the trainer, or those whose snapshots it went on from, ever scored: the
    folder of one that took over begins later. The newest file is written again until it holds `rows_per_file` rows.
    Where `keep_files` is given, the oldest files go. Rows of users who are forgotten lose the user's name.
    """

    def __init__(self, folder: Path, *, rows_per_file: int = 50_000, keep_files: int | None = None) -> None:
        self._folder = folder
        self._rows_per_file = rows_per_file
        self._keep_files = keep_files
        self._tables: list[pa.Table] = []
        self._first = 0
        self._written = True
        self._to_forget: set[str] = set()

    def open(self, scored: int | None = None) -> None:
        """Make the folder, and remove all rows that are scored again: those from number `scored` on, by default all.

        Raises `StoreUnavailable`.
        """
        import pyarrow.parquet as pq

        self._first, self._tables, self._written = scored or 0, [], True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in _files_in(self._folder):
                first = _first_row(path)
                if scored is None or (first is not None and first >= scored):
                    path.unlink()
                elif first is not None and (end := first + pq.read_metadata(path).num_rows) >= scored:
                    self._first, self._tables = first, [pq.read_table(path).slice(0, scored - first)]
                    self._written = end == scored
        except OSError as error:
            raise StoreUnavailable("state folder", f"{self._folder}: {error}") from error
        self._begin_file_if_full()

    @property
    def scored(self) -> int:
        """Number of the next row."""
        rows: int = sum(table.num_rows for table in self._tables)
        return self._first + rows

    @property
    def _path(self) -> Path:
        return self._folder / f"scores-{self._first:012d}.parquet"

    def add(self, scored: Sequence[ScoredRows]) -> None:
        """Add freshly scored rows, in training order; full files are written."""
        for rows in scored:
            self._tables.append(scores_table(rows))
            self._written = False
            self._begin_file_if_full()

    def _begin_file_if_full(self) -> None:
        if self.scored - self._first >= self._rows_per_file:
            self.flush()
            self._first, self._tables = self.scored, []

    def forget(self, user_ids: Collection[str]) -> None:
        """Erase these users' names from all files, with the next `flush` that succeeds."""
        self._to_forget |= set(user_ids)
        self._tables = [_without_names(table, self._to_forget) for table in self._tables]
        self._written = self._written and not self._tables

    def _erase_names(self) -> None:
        import pyarrow.parquet as pq

        try:
            for path in _files_in(self._folder):
                table = pq.read_table(path)
                without = _without_names(table, self._to_forget)
                if not without.equals(table):
                    fresh = path.with_name(f".{path.name}")
                    pq.write_table(without, fresh)
                    os.replace(fresh, path)
        except OSError as error:
            raise StoreUnavailable("state folder", f"{self._folder}: {error}") from error
        self._to_forget = set()

    def flush(self) -> None:
        """Write what has not been written. Raises `StoreUnavailable`."""
        if self._to_forget:
            self._erase_names()
        if self._written:
            return
        import pyarrow as pa  # not above: settings and metrics import this module, and most commands need no parquet
        import pyarrow.parquet as pq

        path = self._path
        fresh = path.with_name(f".{path.name}")
        try:
            pq.write_table(pa.concat_tables(self._tables), fresh)
            os.replace(fresh, path)
            if self._keep_files is not None:
                for old in _files_in(self._folder)[: -self._keep_files]:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreUnavailable("state folder", f"{self._folder}: {error}") from error
        self._written = True


def _first_row(path: Path) -> int | None:
    """None for a file of an earlier build, which numbered its files."""
    digits = path.stem.removeprefix("scores-")
    return int(digits) if len(digits) >= 12 else None


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("scores-*.parquet"), key=lambda path: (len(path.name), path.name))


def _without_names(table: pa.Table, user_ids: Collection[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    users = table.column("user")
    named = pc.is_in(users, value_set=pa.array(sorted(user_ids), users.type))
    erased = pc.if_else(named, pa.scalar("", users.type), users)
    return table.set_column(table.schema.get_field_index("user"), "user", erased)


def scores_table(rows: ScoredRows) -> pa.Table:
    """Scored rows as a table: the columns of `ScoredRows`, and one `score_<variant>` per variant."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        name: getattr(rows, name)
        for name in ("user", "item", "occurred_at", "label", "age_seconds", "catalogue", "retaken")
    }
    columns |= {f"score_{variant}": scores for variant, scores in rows.scores.items()}
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def read_scores(folder: Path) -> ScoredRows | None:
    """All scores of a folder of `ScoreFiles`, in training order; None if there are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainer.metrics import ScoredRows

    files = _files_in(folder)
    if not files:
        return None
    table = pa.concat_tables([pq.read_table(path) for path in files])
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    scores = {name.removeprefix("score_"): columns.pop(name) for name in list(columns) if name.startswith("score_")}
    columns["user"], columns["item"] = columns["user"].astype(str), columns["item"].astype(str)
    return ScoredRows(**columns, scores=scores)


def write_row_lines(path: Path, scored: Sequence[ScoredRows]) -> None:
    """List the training rows in training order, a line each: user, item, event time, label, tab-separated."""
    try:
        with path.open("w") as file:
            for rows in scored:
                for user, item, second, label in zip(rows.user, rows.item, rows.occurred_at, rows.label, strict=True):
                    file.write(f"{user}\t{item}\t{int(second)}\t{label}\n")
    except OSError as error:
        raise StoreUnavailable("rows file", f"{path} (--rows): {error}") from error
