"""A shelf in an object store, through fsspec: S3 and whatever speaks its protocol, or one process's memory.

```text
<root>/<entries>/<name>.<attempt>/<file>   the files of one attempt to put this entry
<root>/<entries>/<name>.json               written last, if not there: names the attempt that counts, sizes, checksums
<root>/<entries>/<name>.attached/<file>    what was attached to it later, each written if not there
<root>/history/<note>
<root>/<pointer>
```

An object store renames nothing, so an entry is there when its small index is there, and of two writers of one name the
first index wins whole: its files lie under a name of their own. The pointer is replaced by a conditional put: S3
compares the entity tag that was read with the one it holds (`If-Match`; `If-None-Match: *` for the first) and does both
in one step, so that of two writers who read the same state one is told "no". fsspec knows no conditional replacement,
but s3fs hands requests through (`call_s3`); where a store has no such request, opening it is refused, since reading and
then writing would lose a rollback one day.

Needs the extra `s3` (s3fs). Credentials come from where AWS's tools look for them, or from `options`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from schemas.errors import Misconfigured, StoreUnavailable
from streams.stores.artifacts.artifact_store import NOTES, NotFound, VersionedPointer, checked_name

_INDEX = ".json"
_ATTACHED = ".attached"


class _Conditional(Protocol):
    """The two requests that fsspec has no word for."""

    def read(self, path: str) -> VersionedPointer | None:
        """Content and tag of an object, of one moment; None if there is none."""
        ...

    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """Write if the object still is as `expected` (None: there is none); False if it is not."""
        ...


class S3ArtifactStore:
    """The promises of `ArtifactStore` under `url` (`s3://bucket/prefix`). `named` is how messages call it."""

    def __init__(
        self, url: str, *, entries: str, pointer: str, named: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self._named = named
        self._fs, root = _open(url, dict(options or {}), named)
        self._entries = f"{root}/{entries}"
        self._pointer = f"{root}/{pointer}"
        self._notes = f"{root}/{NOTES}"
        self._conditional: _Conditional = _InMemory(self._fs) if url.startswith("memory:") else _OnS3(self._fs)

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        """See `ArtifactStore`."""
        index = self._index(name)
        with self._asked("write"):
            if self._conditional.read(index) is not None:
                return
            attempt = f"{name}.{uuid.uuid4().hex[:12]}"
            for file, content in files.items():
                self._fs.pipe_file(f"{self._entries}/{attempt}/{checked_name(file)}", content)
            told = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
            text = json.dumps({"attempt": attempt, "files": told}, indent=2).encode()
            if not self._conditional.put(index, text, expected=None):
                self._remove(f"{self._entries}/{attempt}")  # another writer was faster

    def attach(self, name: str, file: str, content: bytes) -> None:
        """See `ArtifactStore`."""
        with self._asked("write"):
            if self._conditional.read(self._index(name)) is None:
                raise NotFound("store", f"{name} is not there, or not any more, in {self._named}")
            self._conditional.put(self._attached(name, file), content, expected=None)

    def read(self, name: str, file: str) -> bytes:
        """See `ArtifactStore`."""
        with self._asked("read"):
            index = self._conditional.read(self._index(name))
            told = None if index is None else json.loads(index.content)
            if told is None:
                raise NotFound("store", f"{name} is not there, or not any more, in {self._named}")
            if checked_name(file) not in told["files"]:
                attached = self._conditional.read(self._attached(name, file))
                if attached is None:
                    raise NotFound("store", f"{name}/{file} is not there, or not any more, in {self._named}")
                return attached.content
            try:
                content: bytes = self._fs.cat_file(f"{self._entries}/{told['attempt']}/{file}")
            except FileNotFoundError:
                raise NotFound("store", f"{name}/{file} is not there any more in {self._named}") from None
        if hashlib.sha256(content).hexdigest() != told["files"][file]:
            raise StoreUnavailable("store", f"{name}/{file} in {self._named} differs from its checksum")
        return content

    def names(self) -> list[str]:
        """See `ArtifactStore`."""
        with self._asked("list"):
            return sorted(
                name.removesuffix(_INDEX)
                for row in self._listed(self._entries)
                if row["type"] == "file" and (name := row["name"].rsplit("/", 1)[-1]).endswith(_INDEX)
            )

    def drop(self, name: str) -> None:
        """See `ArtifactStore`."""
        with self._asked("remove"):
            index = self._conditional.read(self._index(name))
            if index is None:
                return
            self._remove(self._index(name))
            self._remove(f"{self._entries}/{json.loads(index.content)['attempt']}")
            self._remove(f"{self._entries}/{name}{_ATTACHED}")

    def sweep(self, older_than_seconds: float) -> None:
        """See `ArtifactStore`."""
        with self._asked("list"):
            rows = self._listed(self._entries)
            counted = set()
            for name in self.names():
                index = self._conditional.read(self._index(name))
                if index is not None:
                    counted |= {json.loads(index.content)["attempt"], f"{name}{_ATTACHED}"}
            for row in rows:
                attempt = row["name"].rstrip("/").rsplit("/", 1)[-1]
                if row["type"] == "directory" and attempt not in counted:
                    files = self._listed(f"{self._entries}/{attempt}")
                    if all(_age_seconds(file) > older_than_seconds for file in files):
                        self._remove(f"{self._entries}/{attempt}")

    def pointer(self) -> VersionedPointer | None:
        """See `ArtifactStore`."""
        with self._asked("read"):
            return self._conditional.read(self._pointer)

    def swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """See `ArtifactStore`."""
        with self._asked("write"):
            return self._conditional.put(self._pointer, content, expected=expected)

    def note(self, name: str, content: bytes) -> None:
        """See `ArtifactStore`."""
        with self._asked("write"):
            self._conditional.put(f"{self._notes}/{checked_name(name)}", content, expected=None)

    def note_names(self) -> list[str]:
        """See `ArtifactStore`."""
        with self._asked("list"):
            return sorted(row["name"].rsplit("/", 1)[-1] for row in self._listed(self._notes) if row["type"] == "file")

    def notes(self) -> list[bytes]:
        """See `ArtifactStore`."""
        with self._asked("read"):
            return [self._fs.cat_file(f"{self._notes}/{name}") for name in self.note_names()]

    def _attached(self, name: str, file: str) -> str:
        return f"{self._entries}/{checked_name(name)}{_ATTACHED}/{checked_name(file)}"

    def _index(self, name: str) -> str:
        return f"{self._entries}/{checked_name(name)}{_INDEX}"

    def _listed(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()  # what others wrote meanwhile counts
        try:
            rows: list[dict[str, Any]] = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return rows

    def _remove(self, path: str) -> None:
        self._fs.invalidate_cache()
        try:
            self._fs.rm(path, recursive=True)
        except FileNotFoundError:
            return

    @contextmanager
    def _asked(self, action: str) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise Misconfigured(f"{self._named} does not let us {action}: {error}") from error
        except OSError as error:
            raise StoreUnavailable("store", f"cannot {action} in {self._named}: {error}") from error
        except Exception as error:
            origin = {base.__module__.split(".")[0] for base in type(error).__mro__}
            if not origin & {"botocore", "aiohttp"}:
                raise
            if "Credentials" in type(error).__name__:
                raise Misconfigured(f"{self._named}: {error}") from error
            raise StoreUnavailable("store", f"cannot {action} in {self._named}: {error}") from error


class _OnS3:
    """Conditional requests of S3, which s3fs hands through."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str) -> VersionedPointer | None:
        from fsspec.asyn import sync

        async def get() -> VersionedPointer:
            bucket, key, _ = self._fs.split_path(path)
            answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
            async with answer["Body"] as body:  # content and tag in one answer: of one and the same state
                return VersionedPointer(await body.read(), answer["ETag"])

        try:
            held: VersionedPointer = sync(self._fs.loop, get)
        except FileNotFoundError:
            return None
        return held

    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        bucket, key, _ = self._fs.split_path(path)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected.tag}
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
        except FileNotFoundError:
            return False  # it was to be replaced, and is gone
        except OSError as error:
            if _refused(error):
                return False
            raise
        finally:
            self._fs.invalidate_cache()
        return True


def _refused(error: BaseException) -> bool:
    """Whether S3 said that the object is not as expected: 412, or 409 where two such requests met."""
    cause: BaseException | None = error
    while cause is not None:
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
        cause = cause.__cause__ or cause.__context__
    return False


class _InMemory:
    """The same for fsspec's memory, which all users of one process share."""

    _one_at_a_time = threading.Lock()

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str) -> VersionedPointer | None:
        try:
            return VersionedPointer(self._fs.cat_file(path))
        except FileNotFoundError:
            return None

    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        with self._one_at_a_time:
            if self.read(path) != (None if expected is None else VersionedPointer(expected.content)):
                return False
            self._fs.pipe_file(path, content)
            return True


def _open(url: str, options: dict[str, Any], named: str) -> tuple[Any, str]:
    if url.split("://", 1)[0] not in ("s3", "memory"):
        raise Misconfigured(
            f"{named}: only s3://bucket/prefix can be compared and swapped (S3, or what speaks its protocol: give its "
            "address as the option endpoint_url)"
        )
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise Misconfigured(f"{named} needs the extra s3 ({error}): pip install 'mimstream[s3]'") from None
    except (TypeError, ValueError) as error:
        raise Misconfigured(f"{named}: {error}") from None
    return fs, root.rstrip("/")


def _age_seconds(row: Mapping[str, Any]) -> float:
    written: datetime | float = row["LastModified"] if "LastModified" in row else row["created"]
    return time.time() - (written.timestamp() if isinstance(written, datetime) else written)
