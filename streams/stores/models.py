"""Released models: immutable folders, and one pointer that says which of them is current.

```text
<folder>/releases/r000007-3f2a.../model.safetensors     never changes once it has this name
                                  manifest.json
<folder>/current.json             {"release_id", "weights_sha256", "fence"}, replaced atomically
<folder>/promote.lock             held while the pointer is compared and replaced
```

A release is written under a temporary name, forced to disk and renamed: a reader sees all of it or nothing. The pointer
only moves forward in who may write it: a smaller fence pair than the one it carries is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.base import Message
from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from schemas.manifests import Fence, ModelManifest

if TYPE_CHECKING:  # settings import this module for its configuration; no command should pay for torch because of that
    from torch import Tensor

log = structlog.get_logger()

WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
POINTER_FILE = "current.json"
LOCK_FILE = "promote.lock"
_RELEASE_NAME = re.compile(r"^r[0-9]{6}-[0-9a-f]{12}$")
_UNFINISHED = ".unfinished-"

Weights: TypeAlias = "dict[str, Tensor]"


class ModelStoreConfig(BaseModel):
    """Where released models are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "mimstream" / "models")
    """The folder of releases; trainer and servers see the same one. Its file system must honour locks and renames."""
    keep_releases: int = Field(default=10, ge=2)
    """How many of the newest releases are kept; the current one is kept in any case."""
    grace_seconds: float = Field(default=600.0, ge=0)
    """A release is kept at least this long after its successor was made, for readers that are about to load it."""
    lock_timeout_seconds: float = Field(default=20.0, gt=0)
    """How long a promotion waits for another one on the same folder."""


class CurrentPointer(Message):
    """Contents of `current.json`."""

    release_id: str
    """The release to serve."""
    weights_sha256: str
    """Checksum of its weights."""
    fence: Fence | None = None
    """Who promoted it."""


class ModelStore(Protocol):
    """Where a trainer puts releases and a server finds them. All calls block: use a thread from inside a loop."""

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        """Make a release readable under `manifest.release_id`; nobody serves it yet. Publishing it twice is harmless.

        Raises `ValueError` if `manifest.weights_sha256` is not the checksum of `weights`, `StoreUnavailable` if it
        cannot be written now.
        """
        ...

    def promote(self, release_id: str, fence: Fence | None) -> None:
        """Make a published release the current one.

        Raises `Fenced` if the pointer was written under a larger fence, `StoreUnavailable` if the release is not there.
        """
        ...

    def current(self) -> CurrentPointer | None:
        """Which release to serve; None before the first promotion."""
        ...

    def load(self, release_id: str) -> tuple[Weights, ModelManifest]:
        """Weights and manifest of a release, checked against its checksum.

        Raises `StoreUnavailable` if it is not (or no longer) there: ask `current()` again; `Misconfigured` if it is
        damaged.
        """
        ...

    def list(self) -> list[ModelManifest]:
        """All releases that are kept, oldest first."""
        ...


def pack_weights(weights: Mapping[str, Tensor]) -> bytes:
    """Make the bytes of `model.safetensors`: equal weights give equal bytes."""
    import safetensors.torch

    plain = {name: weights[name].detach().cpu().contiguous().clone() for name in sorted(weights)}
    packed: bytes = safetensors.torch.save(plain)
    return packed


def weights_checksum(packed: bytes) -> str:
    """SHA-256 of packed weights, as hex digits."""
    return hashlib.sha256(packed).hexdigest()


class FolderModelStore:
    """A folder that trainer and servers share.

    `at_step` is told the name of each step just before it reaches the disk, so that a test can end the process there.
    """

    def __init__(
        self,
        config: ModelStoreConfig,
        *,
        clock: Callable[[], float] = time.time,
        at_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._config = config
        self._releases = config.folder / "releases"
        self._pointer = config.folder / POINTER_FILE
        self._clock = clock
        self._at_step = at_step

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        """Write, force to disk, rename."""
        packed = _packed_as_declared(weights, manifest)
        target = self._releases / manifest.release_id
        with self._disk("publish"):
            self._releases.mkdir(parents=True, exist_ok=True)
            if target.exists():
                return  # the id carries the checksum, and a folder with this name is complete
            unfinished = self._releases / f"{_UNFINISHED}{manifest.release_id}-{uuid.uuid4().hex[:8]}"
            self._at_step("make folder")
            unfinished.mkdir()
            self._write(unfinished / WEIGHTS_FILE, packed)
            self._write(unfinished / MANIFEST_FILE, manifest.model_dump_json(indent=2).encode())
            _sync_folder(unfinished)
            self._at_step("rename release")
            try:
                unfinished.rename(target)
            except OSError:
                if not target.exists():
                    raise
                shutil.rmtree(unfinished)  # another process published the very same bytes first
            self._at_step("sync releases")
            _sync_folder(self._releases)

    def promote(self, release_id: str, fence: Fence | None) -> None:
        """Compare the fence and replace the pointer under a lock, then forget releases that are too old."""
        manifest = self._manifest(release_id)
        with self._disk("promote"), self._lock():
            self._at_step("compare fence")
            before = self.current()
            refuse_smaller_fence(before, fence)
            pointer = CurrentPointer(release_id=release_id, weights_sha256=manifest.weights_sha256, fence=fence)
            fresh = self._pointer.with_name(f".{POINTER_FILE}-{uuid.uuid4().hex[:8]}")
            self._write(fresh, pointer.model_dump_json(indent=2).encode())
            self._at_step("replace pointer")
            os.replace(fresh, self._pointer)
            self._at_step("sync folder")
            _sync_folder(self._config.folder)
            self._forget_old(keep={release_id} | ({before.release_id} if before else set()))

    def current(self) -> CurrentPointer | None:
        """Read the pointer."""
        with self._disk("read"):
            try:
                text = self._pointer.read_bytes()
            except FileNotFoundError:
                return None
        try:
            return CurrentPointer.model_validate_json(text)
        except ValidationError as error:
            raise Misconfigured(
                f"{self._pointer} is not a release pointer ({error.error_count()} errors): restore it from a copy, or "
                "remove it and let `mimstream train` release again (MIM_MODELS__FOLDER)"
            ) from None

    def load(self, release_id: str) -> tuple[Weights, ModelManifest]:
        """Read a release and check it."""
        manifest = self._manifest(release_id)
        path = self._releases / release_id / WEIGHTS_FILE
        with self._disk("read"):
            packed = self._read(path)
        return _unpacked_as_declared(packed, manifest, str(path)), manifest

    def list(self) -> list[ModelManifest]:
        """Read the manifests."""
        with self._disk("read"):
            names = sorted(entry.name for entry in os.scandir(self._releases)) if self._releases.is_dir() else []
        found = []
        for name in names:
            if _RELEASE_NAME.match(name):
                with contextlib.suppress(StoreUnavailable):  # forgotten by another process just now
                    found.append(self._manifest(name))
        return found

    def _manifest(self, release_id: str) -> ModelManifest:
        if not _RELEASE_NAME.match(release_id):
            raise ValueError(f"not a release id: {release_id!r}")
        path = self._releases / release_id / MANIFEST_FILE
        with self._disk("read"):
            text = self._read(path)
        try:
            manifest = ModelManifest.model_validate_json(text)
        except ValidationError as error:
            raise _damaged(str(path), f"{error.error_count()} fields are wrong") from None
        if manifest.release_id != release_id:
            raise _damaged(str(path), f"it names release {manifest.release_id}")
        return manifest

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise StoreUnavailable("model store", f"{path} is not there; ask for the current release again") from None

    def _write(self, path: Path, content: bytes) -> None:
        self._at_step(f"write {path.name.lstrip('.').split('.json-')[0]}")
        with path.open("xb") as file:
            half = len(content) // 2
            file.write(content[:half])
            file.flush()
            self._at_step("write second half")
            file.write(content[half:])
            file.flush()
            os.fsync(file.fileno())

    def _forget_old(self, keep: set[str]) -> None:
        """Remove what is neither among the newest nor current nor only just superseded. The lock is held."""
        releases = self.list()
        for release, successor in pairwise(releases):
            if release in releases[-self._config.keep_releases :] or release.release_id in keep:
                continue
            if self._clock() - successor.created_at.timestamp() < self._config.grace_seconds:
                continue
            self._at_step("forget release")
            doomed = self._releases / f"{_UNFINISHED}{release.release_id}-{uuid.uuid4().hex[:8]}"
            (self._releases / release.release_id).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            log.info("models.forgotten", release_id=release.release_id)
        for entry in self._releases.glob(f"{_UNFINISHED}*"):  # left behind by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if self._clock() - entry.stat().st_mtime > max(self._config.grace_seconds, 60.0):
                    shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self._config.folder / LOCK_FILE
        deadline = time.monotonic() + self._config.lock_timeout_seconds
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
                            "model store",
                            f"{path} has been held for {self._config.lock_timeout_seconds:g} s by process {holder}; if "
                            "it is stopped, end it",
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
            raise StoreUnavailable(
                "model store", f"cannot {action} in {self._config.folder} (MIM_MODELS__FOLDER): {error}"
            ) from error


class InMemoryModelStore:
    """The same behaviour without a disk, for one process."""

    def __init__(self) -> None:
        self._releases: dict[str, tuple[bytes, ModelManifest]] = {}
        self._current: CurrentPointer | None = None

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        """Keep a copy."""
        packed = _packed_as_declared(weights, manifest)
        self._releases.setdefault(manifest.release_id, (packed, manifest))

    def promote(self, release_id: str, fence: Fence | None) -> None:
        """Compare the fence and move the pointer."""
        _, manifest = self._release(release_id)
        refuse_smaller_fence(self._current, fence)
        self._current = CurrentPointer(release_id=release_id, weights_sha256=manifest.weights_sha256, fence=fence)

    def current(self) -> CurrentPointer | None:
        """Answer the pointer."""
        return self._current

    def load(self, release_id: str) -> tuple[Weights, ModelManifest]:
        """Unpack a fresh copy of a release."""
        packed, manifest = self._release(release_id)
        return _unpacked_as_declared(packed, manifest, release_id), manifest

    def list(self) -> list[ModelManifest]:
        """Answer all manifests, oldest first."""
        return [manifest for _, (_, manifest) in sorted(self._releases.items())]

    def _release(self, release_id: str) -> tuple[bytes, ModelManifest]:
        try:
            return self._releases[release_id]
        except KeyError:
            raise StoreUnavailable("model store", f"release {release_id} is not there") from None


def refuse_smaller_fence(before: CurrentPointer | None, fence: Fence | None) -> None:
    """Raise `Fenced` unless `fence` may replace what `before` was written under; the same holder may write again."""
    if before is None or before.fence is None:
        return
    if fence is None or fence.as_pair() < before.fence.as_pair():
        ours = "none" if fence is None else f"producer {fence.producer_id}, epoch {fence.epoch}"
        raise Fenced(
            f"release {before.release_id} was promoted by a later trainer (producer {before.fence.producer_id}, epoch "
            f"{before.fence.epoch}; ours: {ours}); if its Kafka cluster is gone for good, use an empty "
            "MIM_MODELS__FOLDER"
        )


def _packed_as_declared(weights: Mapping[str, Tensor], manifest: ModelManifest) -> bytes:
    packed = pack_weights(weights)
    checksum = weights_checksum(packed)
    if checksum != manifest.weights_sha256 or not manifest.release_id.endswith(checksum[:12]):
        raise ValueError(f"manifest {manifest.release_id} does not belong to weights {checksum}")
    return packed


def _unpacked_as_declared(packed: bytes, manifest: ModelManifest, where: str) -> Weights:
    if weights_checksum(packed) != manifest.weights_sha256:
        raise _damaged(where, "its checksum differs from the manifest's")
    import safetensors.torch

    try:
        weights: Weights = safetensors.torch.load(packed)
    except safetensors.SafetensorError as error:
        raise _damaged(where, str(error)) from None
    return weights


def _damaged(where: str, why: str) -> Misconfigured:
    return Misconfigured(
        f"{where} is damaged: {why}; remove this release, or restore its folder (MIM_MODELS__FOLDER) from a copy"
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
