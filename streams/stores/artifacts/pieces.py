"""Rows of the trainer's tables as files that several snapshots share.

```text
pieces/p000012-3f2a.../<hash>.safetensors    rows of tables that changed before snapshot 12, by their numbers
                       writer.json           fence of the trainer that wrote them
pieces/p000012-3f2a...-users/                the same, of tables whose rows name users
```

A snapshot names all files that it needs, in their order: of two with the same row the later counts. It writes only
the rows that changed since the snapshot before it, and some of the others in turn (`trainer.changed_rows`), so that
after some time nothing needs a file any more. An entry goes with its last file that is needed, so when users are erased
all files that name users are written anew into one entry, without them, and the old entries go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import Field

from schemas.base import Message
from schemas.errors import StoreUnavailable
from schemas.manifests import Fence
from streams.stores.artifacts.arrays import pack_arrays, unpack_arrays
from streams.stores.artifacts.artifact_store import ArtifactStore, NotFound
from streams.stores.artifacts.pointer import may_replace

if TYPE_CHECKING:
    from trainer.changed_rows import RowsHeld
    from trainer.state import Arrays, TableCopy

WRITER_FILE = "writer.json"
_USERS = "-users"
_BLOCK_ROWS = 1 << 14
"""Most rows of a table in a file; a later build may write more, not fewer."""
_FILE_BYTES = 1 << 24


class PieceRef(Message):
    """A file of rows, as a snapshot names it."""

    entry: str
    """Entry that the file is in."""
    file: str
    """Its name: the head of its checksum."""
    sha256: str
    """Its checksum."""
    places: dict[str, tuple[int, int]]
    """By table, how far the snapshots up to this one had gone over it: lap and row."""

    def is_needed(self, now: Mapping[str, TableHeld]) -> bool:
        """Whether any table has not gone once around since."""
        return any(
            (now[name].lap, now[name].row) < (lap + 1, row) for name, (lap, row) in self.places.items() if name in now
        )


class TableHeld(Message):
    """A table, as far as the files of a snapshot hold it."""

    count: int = Field(ge=0)
    """Number of rows."""
    lap: int = Field(ge=0)
    """How many times the snapshots went over all of its rows."""
    row: int = Field(ge=0)
    """Row that comes next on the way over them."""


class Pieces:
    """Files of rows in an artifact store. All calls block."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts

    def write(
        self,
        entry: str,
        copies: Mapping[str, TableCopy],
        *,
        after: Sequence[PieceRef],
        erased: Collection[str],
        fence: Fence | None,
    ) -> list[PieceRef]:
        """Write rows behind those of an earlier snapshot, `after`; returns all files that are needed from now on.

        No file that is returned names one of the users `erased` in rows of earlier snapshots. Raises
        `StoreUnavailable`, `NotFound` if a file of the earlier snapshot is gone.
        """
        now = {name: held_of(copy.held) for name, copy in copies.items()}
        refs = [ref for ref in after if ref.is_needed(now)]
        columns = {name: copy.user_column for name, copy in copies.items() if copy.user_column}
        writer = b"null" if fence is None else fence.model_dump_json().encode()
        try:
            for target in (entry, entry + _USERS) if columns else (entry,):
                self._artifacts.put(target, {WRITER_FILE: writer})
            if erased:
                users = frozenset(erased)
                refs = [
                    ref if columns.keys().isdisjoint(ref.places) else self._without(ref, users, columns, entry + _USERS)
                    for ref in refs
                ]
            for target, with_users in ((entry, False), (entry + _USERS, True)):
                chosen = {name: copy for name, copy in copies.items() if (name in columns) == with_users}
                for arrays in _files(chosen):
                    places = {name: copies[name].held.place for name in {key.partition("|")[0] for key in arrays}}
                    refs.append(self._put(target, arrays, places))
        except StoreUnavailable:
            with suppress(StoreUnavailable):
                self.delete(entry)  # a full disk gets its room back
            raise
        return refs

    def read(self, tables: Mapping[str, TableHeld], refs: Sequence[PieceRef]) -> Arrays:
        """The columns of whole tables. Raises `NotFound`, and `ValueError` for contents that do not fit."""
        from trainer.tables import Fold

        if any(table.count > _BLOCK_ROWS * len(refs) for table in tables.values()):
            raise ValueError("it has more rows than its files can hold")  # before memory is taken for them
        folds = {name: Fold(table.count) for name, table in tables.items()}
        for ref in refs:
            for name, columns in self._tables_of(ref).items():
                if name in folds:
                    folds[name].add(columns.pop("#"), columns)
        return {f"{name}{key}": array for name, fold in folds.items() for key, array in fold.arrays().items()}

    def names(self) -> list[str]:
        """Names of all entries."""
        return [name for name in self._artifacts.names() if name.startswith("p")]

    def delete(self, entry: str) -> None:
        """Delete what `write` wrote under this name."""
        for target in (entry, entry + _USERS):
            self._artifacts.delete(target)

    def retain(self, needed: Collection[str], among: Iterable[str], fence: Fence | None) -> None:
        """Delete all other entries `among` these; none of a later trainer."""
        for name in among:
            if name not in needed and may_replace(self._writer(name), fence):
                self._artifacts.delete(name)

    def sweep(self, older_than_seconds: float) -> None:
        """Remove unfinished writes of killed processes."""
        self._artifacts.sweep(older_than_seconds)

    def _writer(self, name: str) -> Fence | None:
        with suppress(NotFound, ValueError):  # a damaged one has no writer
            raw = self._artifacts.read(name, WRITER_FILE)
            return None if raw == b"null" else Fence.model_validate_json(raw)
        return None

    def _put(self, entry: str, arrays: Arrays, places: Mapping[str, tuple[int, int]]) -> PieceRef:
        packed = pack_arrays(arrays)
        checksum = hashlib.sha256(packed).hexdigest()
        file = f"{checksum[:24]}.safetensors"
        self._artifacts.attach(entry, file, packed)
        return PieceRef(entry=entry, file=file, sha256=checksum, places=dict(places))

    def _content(self, ref: PieceRef) -> bytes:
        content = self._artifacts.read(ref.entry, ref.file)
        if hashlib.sha256(content).hexdigest() != ref.sha256:
            raise ValueError(f"the checksum of {ref.entry}/{ref.file} differs from the one it was written with")
        return content

    def _tables_of(self, ref: PieceRef) -> dict[str, dict[str, Any]]:
        tables: dict[str, dict[str, Any]] = {}
        for key, array in unpack_arrays(self._content(ref)).items():
            name, _, column = key.partition("|")
            tables.setdefault(name, {})[column] = array
        return tables

    def _without(self, ref: PieceRef, erased: Collection[str], user_columns: Mapping[str, str], entry: str) -> PieceRef:
        """A file of `entry` without the rows of these users: later files hold what these rows are now."""
        from trainer.tables import rows_without

        tables = self._tables_of(ref)
        tables |= {
            name: rows_without(tables[name], column, erased) for name, column in user_columns.items() if name in tables
        }
        arrays = {f"{name}|{key}": array for name, columns in tables.items() for key, array in columns.items()}
        return self._put(entry, arrays, ref.places)


def held_of(held: RowsHeld) -> TableHeld:
    """What a manifest says of a table."""
    return TableHeld(count=held.count, lap=held.lap, row=held.row)


def refs_in(content: bytes) -> set[str]:
    """Entries that the manifest of a snapshot names. Raises `ValueError` if it is damaged."""
    manifest = json.loads(content)
    refs = manifest.get("pieces", []) if isinstance(manifest, dict) else None
    if not isinstance(refs, list):
        raise ValueError("not the manifest of a snapshot")
    return {PieceRef.model_validate(ref).entry for ref in refs}


def _files(copies: Mapping[str, TableCopy]) -> Iterator[Arrays]:
    """The rows as the arrays of one file after the other, of about the same size."""
    waiting: Arrays = {}
    for name, copy in copies.items():
        for start in range(0, max(len(copy.numbers), 1), _BLOCK_ROWS):  # a table without rows has columns all the same
            block = slice(start, start + _BLOCK_ROWS)
            columns = copy.columns(block).arrays | {"#": copy.numbers[block]}
            if start or sum(array.nbytes for array in waiting.values()) > _FILE_BYTES:
                yield waiting
                waiting = {}
            waiting |= {f"{name}|{key}": array for key, array in columns.items()}
    if waiting:
        yield waiting
