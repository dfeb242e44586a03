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
    """Prequential scores as `scores-000001.parquet`, ... in a folder; every file is complete at every moment.

    The newest file is written again until it holds `rows_per_file` rows. Where `keep_files` is given, the oldest files
    go. Rows of users who are forgotten lose the user's name. A folder belongs to one lineage of runs: what an earlier
    one wrote beyond the place where this one starts is removed, since its rows are made again.
    """

    def __init__(self, folder: Path, *, rows_per_file: int = 50_000, keep_files: int | None = None) -> None:
        self._folder = folder
        self._rows_per_file = rows_per_file
        self._keep_files = keep_files
        self._tables: list[pa.Table] = []
        self._number = 0
        self._written = True
        self._to_forget: set[str] = set()

    def open(self, at: tuple[int, int] | None = None) -> None:
        """Make the folder and clear it of an earlier run, but for what that had written `at` the place of a snapshot.

        Raises `StoreUnavailable`.
        """
        import pyarrow.parquet as pq

        self._number, rows = at or (1, 0)
        self._tables, self._written = [], True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("scores-*.parquet"):
                if _order(old) > _order(self._path) or (old.name == self._path.name and not rows) or at is None:
                    old.unlink()
            if rows and self._path.exists():
                self._tables, self._written = [pq.read_table(self._path).slice(0, rows)], False
        except OSError as error:
            raise StoreUnavailable("state folder", f"{self._folder}: {error}") from error

    @property
    def place(self) -> tuple[int, int]:
        """Number of the newest file, and its rows so far."""
        return self._number, sum(table.num_rows for table in self._tables)

    @property
    def _path(self) -> Path:
        return self._folder / f"scores-{self._number:06d}.parquet"

    def add(self, scored: Sequence[ScoredRows]) -> None:
        """Add freshly scored rows, in training order; full files are written."""
        for rows in scored:
            self._tables.append(scores_table(rows))
            self._written = False
            if sum(table.num_rows for table in self._tables) >= self._rows_per_file:
                self.flush()
                self._tables, self._number = [], self._number + 1

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


def _order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name  # by number: padded with zeros to six digits, it may outgrow them


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("scores-*.parquet"), key=_order)


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
