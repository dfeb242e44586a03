"""Where releases and checkpoints are kept: entries that never change, and one pointer that is compared and swapped.

```text
entry      a name and some files, visible all at once or not at all, immutable; putting it again changes nothing.
           More files can be attached later, each written once
audit      small files that are written once and never deleted
pointer    one small text; replaced only by a writer that read its present state, so that of two writers one fails
```

A folder (`FolderArtifactStore`) and an object store (`object_store`) keep the same promises; `pointer` has the
optimistic update of the pointer. The contents of the files are opaque here. All calls block: use a thread from inside
a loop. What heals by waiting is `StoreUnavailable`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from schemas.errors import StoreUnavailable

LOCK_FILE = "promote.lock"
AUDIT_FOLDER = "history"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_UNFINISHED = ".unfinished-"
_NUMBERED = re.compile(r"^([A-Za-z]?)([0-9]+)-")


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted by the number at their head: padded with zeros to a width, it may outgrow that width."""

    def key(name: str) -> tuple[str, int, str]:
        head = _NUMBERED.match(name)
        return (name, -1, name) if head is None else (head[1], int(head[2]), name)

    return sorted(names, key=key)


class NotFound(StoreUnavailable):
    """The store answers, and has no such entry or file (any more)."""


@dataclass(frozen=True, slots=True)
class VersionedPointer:
    """Text of the pointer, with the tag by which the store recognises this state."""

    content: bytes
    tag: str = ""


class ArtifactStore(Protocol):
    """Entries, an audit trail and one pointer under one root."""

    def check(self) -> None:
        """Write and remove a probe; `Misconfigured` or `StoreUnavailable` if a writer cannot rely on the store."""

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        """Make an entry. An existing one of that name stays as it is, whatever `files` contain."""

    def attach(self, name: str, file: str, content: bytes) -> None:
        """Add one more file to an entry; an existing one of that name stays. Raises `NotFound`."""

    def read(self, name: str, file: str) -> bytes:
        """One file of an entry, attached or not. Raises `NotFound` if there is none of that name."""

    def names(self) -> list[str]:
        """Names of all entries, sorted."""

    def delete(self, name: str) -> None:
        """Delete an entry. A concurrent reader of it may find a file missing."""

    def sweep(self, older_than_seconds: float) -> None:
        """Remove unfinished writes of killed processes."""

    def pointer(self) -> VersionedPointer | None:
        """Present state of the pointer; None before the first write."""

    def compare_and_swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """Replace the pointer if its state is still `expected` (None: it does not exist); False otherwise."""

    def append_audit(self, name: str, content: bytes) -> None:
        """Write an audit record unless there is one of that name."""

    def audit_names(self) -> list[str]:
        """Names of all audit records, sorted."""

    def audit_trail(self) -> list[bytes]:
        """All audit records, in the order of their names."""


class FolderArtifactStore(ArtifactStore):
    """A folder that several processes share; its file system must honour locks and renames.

    ```text
    <root>/<entries>/<name>/<file>      written under another name, forced to disk, renamed
    <root>/history/<audit record>
    <root>/<pointer>                    replaced by a rename, under <root>/promote.lock
    ```

    `named` is the root in messages (`/data/models (MIM_MODELS__FOLDER)`). `at_step` gets the name of each step just
    before it reaches the disk, so that a test can end the process there.
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
        self._audit = root / AUDIT_FOLDER
        self._named = named
        self._lock_timeout_seconds = lock_timeout_seconds
        self._at_step = at_step

    @override
    def check(self) -> None:
        with self._errors("write"):
            self._root.mkdir(parents=True, exist_ok=True)
            with self._lock():
                for folder in (self._root, self._entries, self._audit):
                    if folder.exists():
                        probe = folder / f"{_UNFINISHED}check-{uuid.uuid4().hex[:8]}"
                        self._write(probe, b"")
                        probe.unlink()

    @override
    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        target = self.entry_folder(name)
        with self._errors("write"):
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

    @override
    def attach(self, name: str, file: str, content: bytes) -> None:
        entry = self.entry_folder(name)
        with self._errors("write"):
            try:
                self._write_once(entry / checked_name(file), content)
            except FileNotFoundError:
                raise NotFound("store", f"{entry} is not there, or not any more") from None

    @override
    def read(self, name: str, file: str) -> bytes:
        path = self.entry_folder(name) / checked_name(file)
        with self._errors("read"):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                raise NotFound("store", f"{path} is not there, or not any more") from None

    @override
    def names(self) -> list[str]:
        with self._errors("read"):
            if not self._entries.is_dir():
                return []
            return in_order(entry.name for entry in os.scandir(self._entries) if _NAME.match(entry.name))

    @override
    def delete(self, name: str) -> None:
        doomed = self._entries / f"{_UNFINISHED}{name}-{uuid.uuid4().hex[:8]}"
        with self._errors("remove"):
            self._at_step("drop entry")
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self.entry_folder(name).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    @override
    def sweep(self, older_than_seconds: float) -> None:
        patterns = (f"{_UNFINISHED}*", f"*/{_UNFINISHED}*")
        for entry in [
            found for pattern in patterns for found in (*self._entries.glob(pattern), *self._audit.glob(pattern))
        ]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > older_than_seconds:
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()

    @override
    def pointer(self) -> VersionedPointer | None:
        with self._errors("read"):
            try:
                return VersionedPointer(self._pointer.read_bytes())
            except FileNotFoundError:
                return None

    @override
    def compare_and_swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        with self._errors("write"), self._lock():
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

    @override
    def append_audit(self, name: str, content: bytes) -> None:
        with self._errors("write"):
            self._audit.mkdir(parents=True, exist_ok=True)
            self._write_once(self._audit / checked_name(name), content)

    @override
    def audit_names(self) -> list[str]:
        with self._errors("read"):
            return in_order(path.name for path in self._audit.glob("[!.]*"))

    @override
    def audit_trail(self) -> list[bytes]:
        with self._errors("read"):
            return [(self._audit / name).read_bytes() for name in self.audit_names()]

    def entry_folder(self, name: str) -> Path:
        """Folder of an entry, whether it exists or not."""
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
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable("store", f"cannot {action} in {self._named}: {error}") from error


class InMemoryArtifactStore(ArtifactStore):
    """An artifact store in the memory of one process."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, bytes]] = {}
        self._pointer: VersionedPointer | None = None
        self._audit: dict[str, bytes] = {}

    @override
    def check(self) -> None:
        pass

    @override
    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        self._entries.setdefault(checked_name(name), dict(files))

    @override
    def attach(self, name: str, file: str, content: bytes) -> None:
        if name not in self._entries:
            raise NotFound("store", f"{name} is not there, or not any more")
        self._entries[name].setdefault(checked_name(file), content)

    @override
    def read(self, name: str, file: str) -> bytes:
        try:
            return self._entries[name][file]
        except KeyError:
            raise NotFound("store", f"{name}/{file} is not there, or not any more") from None

    @override
    def names(self) -> list[str]:
        return in_order(self._entries)

    @override
    def delete(self, name: str) -> None:
        self._entries.pop(name, None)

    @override
    def sweep(self, older_than_seconds: float) -> None:
        pass

    @override
    def pointer(self) -> VersionedPointer | None:
        return self._pointer

    @override
    def compare_and_swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        if self._pointer != expected:
            return False
        self._pointer = VersionedPointer(content)
        return True

    @override
    def append_audit(self, name: str, content: bytes) -> None:
        self._audit.setdefault(checked_name(name), content)

    @override
    def audit_names(self) -> list[str]:
        return in_order(self._audit)

    @override
    def audit_trail(self) -> list[bytes]:
        return [self._audit[name] for name in self.audit_names()]


def checked_name(name: str) -> str:
    """The name itself. Raises `ValueError` for one that could lead out of the store."""
    if not _NAME.match(name):
        raise ValueError(f"not a name of an entry or file: {name!r}")
    return name


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
