"""An artifact store in an object store, through fsspec: S3 and compatible services, or one process's memory.

```text
<root>/<entries>/<name>.<attempt>/<file>   files of one attempt to put this entry
<root>/<entries>/<name>.json               written last, if absent: names the valid attempt and checksums
<root>/<entries>/<name>.attached/<file>    files attached later, each written if absent
<root>/history/<audit record>
<root>/<pointer>
```

An object store has no rename, so an entry exists when its small index exists, and of two writers of one name the first
index wins as a whole: its files have a prefix of their own. The pointer is replaced by a conditional put: S3 compares
the entity tag that was read with the present one (`If-Match`; `If-None-Match: *` for the first) in one atomic step, so
that of two writers that read the same state one fails. fsspec has no conditional replacement, but s3fs passes requests
through (`call_s3`). A store that ignores the conditions, or has none, would lose a rollback: `check` finds out.

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

from typing_extensions import override

from schemas.errors import Misconfigured, StoreUnavailable
from streams.stores.artifacts.artifact_store import (
    AUDIT_FOLDER,
    ArtifactStore,
    NotFound,
    VersionedPointer,
    checked_name,
    in_order,
)

_INDEX = ".json"
_ATTACHED = ".attached"


class _ConditionalRequests(Protocol):
    """The two requests that fsspec has no method for."""

    def read(self, path: str) -> VersionedPointer | None:
        """Content and tag of an object, read atomically; None if there is none."""

    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        """Write if the object is still in state `expected` (None: it does not exist); False otherwise."""


class S3ArtifactStore(ArtifactStore):
    """An artifact store under `url` (`s3://bucket/prefix`). `named` is the place in messages."""

    def __init__(
        self,
        url: str,
        *,
        entries: str,
        pointer: str,
        named: str,
        options: Mapping[str, Any] | None = None,
        timeout_seconds: float = 20.0,
    ) -> None:
        self._named = named
        self._timeout_seconds = timeout_seconds
        self._fs, root = _open(url, dict(options or {}), named, timeout_seconds)
        self._root = root
        self._entries = f"{root}/{entries}"
        self._pointer = f"{root}/{pointer}"
        self._audit = f"{root}/{AUDIT_FOLDER}"
        self._conditional: _ConditionalRequests = _InMemory(self._fs) if url.startswith("memory:") else _OnS3(self._fs)

    @override
    def check(self) -> None:
        probe = f"{self._root}/.check-{uuid.uuid4().hex}"
        with self._errors("write"):
            put = self._conditional.put
            if not put(probe, b"1", expected=None):
                raise StoreUnavailable("store", f"{self._named} refused to write an object that is not there")
            try:
                first = self._conditional.read(probe)
                unheeded = put(probe, b"2", expected=None)
                swapped = put(probe, b"3", expected=first)
                unheeded = unheeded or put(probe, b"4", expected=first)
            finally:
                self._remove(probe)
        if unheeded or not swapped:
            raise Misconfigured(
                f"{self._named} does not heed the conditions of a put (If-Match, If-None-Match): of two writers at "
                "once, one would be lost. Use a store that does (S3, MinIO), or a folder (MIM_MODELS__FOLDER)"
            )

    @override
    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        index = self._index(name)
        with self._errors("write"):
            if self._conditional.read(index) is not None:
                return
            attempt = f"{name}.{uuid.uuid4().hex[:12]}"
            for file, content in files.items():
                self._fs.pipe_file(f"{self._entries}/{attempt}/{checked_name(file)}", content)
            checksums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
            text = json.dumps({"attempt": attempt, "files": checksums}, indent=2).encode()
            if not self._conditional.put(index, text, expected=None):
                self._remove(f"{self._entries}/{attempt}")  # another writer was faster

    @override
    def attach(self, name: str, file: str, content: bytes) -> None:
        with self._errors("write"):
            if self._conditional.read(self._index(name)) is None:
                raise NotFound("store", f"{name} is not there, or not any more, in {self._named}")
            self._conditional.put(self._attached(name, file), content, expected=None)

    @override
    def read(self, name: str, file: str) -> bytes:
        with self._errors("read"):
            index = self._conditional.read(self._index(name))
            described = None if index is None else json.loads(index.content)
            if described is None:
                raise NotFound("store", f"{name} is not there, or not any more, in {self._named}")
            if checked_name(file) not in described["files"]:
                attached = self._conditional.read(self._attached(name, file))
                if attached is None:
                    raise NotFound("store", f"{name}/{file} is not there, or not any more, in {self._named}")
                return attached.content
            try:
                content: bytes = self._fs.cat_file(f"{self._entries}/{described['attempt']}/{file}")
            except FileNotFoundError:
                raise NotFound("store", f"{name}/{file} is not there any more in {self._named}") from None
        if hashlib.sha256(content).hexdigest() != described["files"][file]:
            raise StoreUnavailable("store", f"{name}/{file} in {self._named} differs from its checksum")
        return content

    @override
    def names(self) -> list[str]:
        with self._errors("list"):
            return in_order(
                name.removesuffix(_INDEX)
                for row in self._listed(self._entries)
                if row["type"] == "file" and (name := row["name"].rsplit("/", 1)[-1]).endswith(_INDEX)
            )

    @override
    def delete(self, name: str) -> None:
        with self._errors("remove"):
            index = self._conditional.read(self._index(name))
            if index is None:
                return
            self._remove(self._index(name))
            self._remove(f"{self._entries}/{json.loads(index.content)['attempt']}")
            self._remove(f"{self._entries}/{name}{_ATTACHED}")

    @override
    def sweep(self, older_than_seconds: float) -> None:
        with self._errors("list"):
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

    @override
    def pointer(self) -> VersionedPointer | None:
        with self._errors("read"):
            return self._conditional.read(self._pointer)

    @override
    def compare_and_swap(self, content: bytes, *, expected: VersionedPointer | None) -> bool:
        with self._errors("write"):
            return self._conditional.put(self._pointer, content, expected=expected)

    @override
    def append_audit(self, name: str, content: bytes) -> None:
        with self._errors("write"):
            self._conditional.put(f"{self._audit}/{checked_name(name)}", content, expected=None)

    @override
    def audit_names(self) -> list[str]:
        with self._errors("list"):
            return in_order(
                row["name"].rsplit("/", 1)[-1] for row in self._listed(self._audit) if row["type"] == "file"
            )

    @override
    def audit_trail(self) -> list[bytes]:
        with self._errors("read"):
            return [self._fs.cat_file(f"{self._audit}/{name}") for name in self.audit_names()]

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
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:  # objects that are not there are met before
            raise Misconfigured(f"{self._named}: there is no such bucket ({error}); create it") from error
        except NotImplementedError as error:
            raise Misconfigured(f"{self._named} has no conditional puts ({error}): use a store that has") from error
        except PermissionError as error:
            raise Misconfigured(f"{self._named} does not let us {action}: {error}") from error
        except OSError as error:
            if _status(error) == 501:
                raise Misconfigured(f"{self._named} has no conditional puts ({error}): use a store that has") from error
            raise StoreUnavailable(
                "store", f"cannot {action} in {self._named}: {error}{self._waited(error)}"
            ) from error
        except Exception as error:
            origin = {base.__module__.split(".")[0] for base in type(error).__mro__}
            if not origin & {"botocore", "aiohttp"}:
                raise
            if "Credentials" in type(error).__name__:
                raise Misconfigured(f"{self._named}: {error}") from error
            raise StoreUnavailable(
                "store", f"cannot {action} in {self._named}: {error}{self._waited(error)}"
            ) from error

    def _waited(self, error: BaseException) -> str:
        if "timeout" not in f"{type(error).__name__} {error}".lower():
            return ""
        return f"; waited {self._timeout_seconds:g} s (MIM_MODELS__TIMEOUT_SECONDS)"


class _OnS3(_ConditionalRequests):
    """Conditional requests of S3, which s3fs passes through."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    @override
    def read(self, path: str) -> VersionedPointer | None:
        from fsspec.asyn import sync

        async def get() -> VersionedPointer:
            bucket, key, _ = self._fs.split_path(path)
            answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
            async with answer["Body"] as body:  # content and tag in one reply: of the same state
                return VersionedPointer(await body.read(), answer["ETag"])

        try:
            held: VersionedPointer = sync(self._fs.loop, get)
        except FileNotFoundError:
            return None
        return held

    @override
    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        bucket, key, _ = self._fs.split_path(path)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected.tag}
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
        except FileNotFoundError:
            if expected is None:
                raise  # the bucket is not there
            return False  # it was to be replaced, and is gone
        except OSError as error:
            if _status(error) in (409, 412):  # 412: the condition is not met, 409: two such requests at once
                return False
            raise
        finally:
            self._fs.invalidate_cache()
        return True


def _status(error: BaseException) -> int | None:
    """HTTP status of S3's answer; None without one."""
    cause: BaseException | None = error
    while cause is not None:
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):
            status: int | None = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status
        cause = cause.__cause__ or cause.__context__
    return None


class _InMemory(_ConditionalRequests):
    """The same for fsspec's memory, which all users of one process share."""

    _one_at_a_time = threading.Lock()

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    @override
    def read(self, path: str) -> VersionedPointer | None:
        try:
            return VersionedPointer(self._fs.cat_file(path))
        except FileNotFoundError:
            return None

    @override
    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        with self._one_at_a_time:
            if self.read(path) != (None if expected is None else VersionedPointer(expected.content)):
                return False
            self._fs.pipe_file(path, content)
            return True


def _open(url: str, options: dict[str, Any], named: str, timeout_seconds: float) -> tuple[Any, str]:
    if url.split("://", 1)[0] not in ("s3", "memory"):
        raise Misconfigured(
            f"{named}: only s3://bucket/prefix can be compared and swapped (S3, or what speaks its protocol: give its "
            "address as the option endpoint_url)"
        )
    try:
        import fsspec

        if url.startswith("s3:"):
            # two attempts; the clients' own defaults add up to minutes in which a command says nothing
            waits = {"connect_timeout": timeout_seconds / 2, "read_timeout": timeout_seconds / 2}
            once = {"retries": {"total_max_attempts": 1}}
            options = options | {"config_kwargs": waits | once | dict(options.get("config_kwargs", {}))}
        fs, root = fsspec.core.url_to_fs(url, **options)
        if url.startswith("s3:"):
            fs.retries = 2
    except ImportError as error:
        raise Misconfigured(f"{named} needs s3fs ({error}): pip install s3fs") from None
    except (TypeError, ValueError) as error:
        raise Misconfigured(f"{named}: {error}") from None
    return fs, root.rstrip("/")


def _age_seconds(row: Mapping[str, Any]) -> float:
    written: datetime | float = row["LastModified"] if "LastModified" in row else row["created"]
    return time.time() - (written.timestamp() if isinstance(written, datetime) else written)
