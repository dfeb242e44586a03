"""Where releases and snapshots are kept: entries that never change, and one pointer that is compared and swapped.

```text
entry      a name and some files, all of them or none to be seen, never changed; put again under its name: harmless.
           What is found out about it later is attached, a file each, written once
note       one small file that is written once, for ever: the audit trail
pointer    one small text; replaced by whoever still knows what it holds, so that of two writers one is told "no"
```

A folder (`FolderArtifactStore`) and an object store (`object_store`) keep the same promises. To change the
pointer, say what it should become, given what it is:

    exchange(shelf, lambda before: after)

The function is called again with what is there then if somebody else was faster, so whatever it refuses (a smaller
fence, a pin) is refused against the pointer that is really replaced: between its look and its write nobody else wrote.
A process that was stopped for an hour between the two is told "no" as well. The pointer's text must differ at every
change (give it a running number): equal texts are taken for the same state.

Nothing here knows what is in the files. All calls block: use a thread from inside a loop. What heals by waiting is
`StoreUnavailable`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from schemas.errors import StoreUnavailable

LOCK_FILE = "promote.lock"
NOTES = "history"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_UNFINISHED = ".unfinished-"
_MAX_ATTEMPTS = 100


class NotFound(StoreUnavailable):
    """The store answers, and does not hold this entry or file (any more)."""


@dataclass(frozen=True, slots=True)
class VersionedPointer:
    """What the pointer holds, with whatever the store needs to recognise this very state again."""

    content: bytes
    tag: str = ""


class ArtifactStore(Protocol):
    """Entries, notes and one pointer under one root."""

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        """Make an entry. If one of that name is there it stays as it is, whatever `files` hold now."""
        ...

    def attach(self, name: str, file: str, content: bytes) -> None:
        """Add one more file to an entry, once: if it has one of that name, that stays. Raises `NotFound`."""
        ...

    def read(self, name: str, file: str) -> bytes:
        """One file of an entry, attached or not. Raises `NotFound` if there is none of that name."""
        ...

    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        ...

    def drop(self, name: str) -> None:
        """Take an entry away, at once for who asks now. Somebody who is reading it may find a file missing."""
        ...

    def sweep(self, older_than_seconds: float) -> None:
        """Remove what writers that were killed left behind."""
        ...

    def pointer(self) -> VersionedPointer | None:
        """What the pointer holds; None before the first swap."""
        ...

    def swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """Replace the pointer if it still is as `expected` (None: there is none); False if it is not."""
        ...

    def note(self, name: str, content: bytes) -> None:
        """Write a note unless there is one of that name."""
        ...

    def note_names(self) -> list[str]:
        """Names of all notes, sorted."""
        ...

    def notes(self) -> list[bytes]:
        """All notes, in the order of their names."""
        ...


def exchange(shelf: ArtifactStore, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
    """Replace the pointer by what `change` makes of it; None leaves it alone. Returns what it made.

    What `change` raises passes through, and nothing is written.
    """
    for _ in range(_MAX_ATTEMPTS):
        before = shelf.pointer()
        after = change(None if before is None else before.content)
        if after is None or shelf.swap(after, expected=before):
            return after
        now = shelf.pointer()
        if now is not None and now.content == after:
            return after  # ours: the answer to an earlier attempt got lost on the way
    raise StoreUnavailable("store", f"the pointer was replaced {_MAX_ATTEMPTS} times while it was to be changed")


class FolderArtifactStore:
    """A folder that several processes share; its file system must honour locks and renames.

    ```text
    <root>/<entries>/<name>/<file>      written under another name, forced to disk, renamed
    <root>/history/<note>
    <root>/<pointer>                    replaced by a rename, under <root>/promote.lock
    ```

    `named` is how messages call the root (`/data/models (MIM_MODELS__FOLDER)`). `at_step` is told each step just before
    it reaches the disk, so that a test can end the process there.
    """

    def __init__(
        self,
        root: Path,
        *,
        entries: str,
        pointer: str,
        named: str,
        lock_timeout_seconds: float = 20.0,
        at_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._root = root
        self._entries = root / entries
        self._pointer = root / pointer
        self._notes = root / NOTES
        self._named = named
        self._lock_timeout_seconds = lock_timeout_seconds
        self._at_step = at_step

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        """See `ArtifactStore`."""
        target = self._entry(name)
        with self._disk("write"):
            self._entries.mkdir(parents=True, exist_ok=True)
            if target.exists():
                return
            unfinished = self._entries / f"{_UNFINISHED}{name}-{uuid.uuid4().hex[:8]}"
            self._at_step("make folder")
            unfinished.mkdir()
            try:
                for file, content in files.items():
                    self._write(unfinished / checked_name(file), content)
                _sync_folder(unfinished)
                self._at_step("rename entry")
                unfinished.rename(target)
            except OSError:
                shutil.rmtree(unfinished, ignore_errors=True)  # a full disk gets its room back
                if not target.exists():  # else another process was faster
                    raise
            self._at_step("sync entries")
            _sync_folder(self._entries)

    def attach(self, name: str, file: str, content: bytes) -> None:
        """See `ArtifactStore`."""
        entry = self._entry(name)
        with self._disk("write"):
            try:
                self._write_once(entry / checked_name(file), content)
            except FileNotFoundError:
                raise NotFound("store", f"{entry} is not there, or not any more") from None

    def read(self, name: str, file: str) -> bytes:
        """See `ArtifactStore`."""
        path = self._entry(name) / checked_name(file)
        with self._disk("read"):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                raise NotFound("store", f"{path} is not there, or not any more") from None

    def names(self) -> list[str]:
        """See `ArtifactStore`."""
        with self._disk("read"):
            if not self._entries.is_dir():
                return []
            return sorted(entry.name for entry in os.scandir(self._entries) if _NAME.match(entry.name))

    def drop(self, name: str) -> None:
        """See `ArtifactStore`."""
        doomed = self._entries / f"{_UNFINISHED}{name}-{uuid.uuid4().hex[:8]}"
        with self._disk("remove"):
            self._at_step("drop entry")
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self._entry(name).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self, older_than_seconds: float) -> None:
        """See `ArtifactStore`."""
        patterns = (f"{_UNFINISHED}*", f"*/{_UNFINISHED}*")
        for entry in [
            found for pattern in patterns for found in (*self._entries.glob(pattern), *self._notes.glob(pattern))
        ]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > older_than_seconds:
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()

    def pointer(self) -> VersionedPointer | None:
        """See `ArtifactStore`."""
        with self._disk("read"):
            try:
                return VersionedPointer(self._pointer.read_bytes())
            except FileNotFoundError:
                return None

    def swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """See `ArtifactStore`."""
        with self._disk("write"), self._lock():
            self._at_step("compare pointer")
            now = self.pointer()
            if (None if now is None else now.content) != (None if expected is None else expected.content):
                return False
            fresh = self._pointer.with_name(f".{self._pointer.name}-{uuid.uuid4().hex[:8]}")
            self._write(fresh, content)
            self._at_step("replace pointer")
            os.replace(fresh, self._pointer)
            self._at_step("sync folder")
            _sync_folder(self._root)
        return True

    def note(self, name: str, content: bytes) -> None:
        """See `ArtifactStore`."""
        with self._disk("write"):
            self._notes.mkdir(parents=True, exist_ok=True)
            self._write_once(self._notes / checked_name(name), content)

    def note_names(self) -> list[str]:
        """See `ArtifactStore`."""
        with self._disk("read"):
            return sorted(path.name for path in self._notes.glob("[!.]*"))

    def notes(self) -> list[bytes]:
        """See `ArtifactStore`."""
        with self._disk("read"):
            return [(self._notes / name).read_bytes() for name in self.note_names()]

    def _entry(self, name: str) -> Path:
        return self._entries / checked_name(name)

    def _write_once(self, path: Path, content: bytes) -> None:
        if path.exists():
            return
        fresh = path.with_name(f"{_UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}")
        self._write(fresh, content)
        self._at_step("link file")
        with contextlib.suppress(FileExistsError):  # unlike a rename, a link replaces nothing
            os.link(fresh, path)
        fresh.unlink()
        _sync_folder(path.parent)

    def _write(self, path: Path, content: bytes) -> None:
        self._at_step(f"write {path.name.lstrip('.')}")
        with path.open("xb") as file:
            half = len(content) // 2
            file.write(content[:half])
            file.flush()
            self._at_step("write second half")
            file.write(content[half:])
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._root / LOCK_FILE
        deadline = time.monotonic() + self._lock_timeout_seconds
        with path.open("a+") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        file.seek(0)
                        holder = file.read(20).strip() or "unknown"
                        raise StoreUnavailable(
                            "store",
                            f"{path} has been held for {self._lock_timeout_seconds:g} s by process {holder}; if it is "
                            "stopped, end it",
                        ) from None
                    time.sleep(0.02)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    @contextmanager
    def _disk(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable("store", f"cannot {action} in {self._named}: {error}") from error


class InMemoryArtifactStore:
    """The same behaviour in one process's memory."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, bytes]] = {}
        self._held: VersionedPointer | None = None
        self._notes: dict[str, bytes] = {}

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        """See `ArtifactStore`."""
        self._entries.setdefault(checked_name(name), dict(files))

    def attach(self, name: str, file: str, content: bytes) -> None:
        """See `ArtifactStore`."""
        if name not in self._entries:
            raise NotFound("store", f"{name} is not there, or not any more")
        self._entries[name].setdefault(checked_name(file), content)

    def read(self, name: str, file: str) -> bytes:
        """See `ArtifactStore`."""
        try:
            return self._entries[name][file]
        except KeyError:
            raise NotFound("store", f"{name}/{file} is not there, or not any more") from None

    def names(self) -> list[str]:
        """See `ArtifactStore`."""
        return sorted(self._entries)

    def drop(self, name: str) -> None:
        """See `ArtifactStore`."""
        self._entries.pop(name, None)

    def sweep(self, older_than_seconds: float) -> None:
        """See `ArtifactStore`."""

    def pointer(self) -> VersionedPointer | None:
        """See `ArtifactStore`."""
        return self._held

    def swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """See `ArtifactStore`."""
        if self._held != expected:
            return False
        self._held = VersionedPointer(content)
        return True

    def note(self, name: str, content: bytes) -> None:
        """See `ArtifactStore`."""
        self._notes.setdefault(checked_name(name), content)

    def note_names(self) -> list[str]:
        """See `ArtifactStore`."""
        return sorted(self._notes)

    def notes(self) -> list[bytes]:
        """See `ArtifactStore`."""
        return [self._notes[name] for name in self.note_names()]


def checked_name(name: str) -> str:
    """The name itself. Raises `ValueError` for what could leave the shelf."""
    if not _NAME.match(name):
        raise ValueError(f"not a name of an entry or file: {name!r}")
    return name


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
