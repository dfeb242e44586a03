"""Model registry: releases as immutable entries, and one pointer to the current one.

```text
releases/r000007-3f2a.../model.safetensors     never changes once it has this name
                         manifest.json
                         verdict.json          attached later: how it compared with the release that was current then
current.json             {"release_id", "fence", "pinned", "by", "at", "why", ...}, compared and swapped
history/00000012-r000007-3f2a....json   what `current.json` was before its 13th change: written before it, immutable
```

The artifact store is a folder that trainer and servers share, or an object store. `promotion` has the rules for the
pointer.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import structlog
from pydantic import ValidationError

from schemas.base import Message
from schemas.errors import Misconfigured, PipelineError
from schemas.manifests import RELEASE_ID, Fence, ModelManifest, PromotionDecision
from streams.stores.artifacts import promotion
from streams.stores.artifacts.artifact_store import (
    ArtifactStore,
    FolderArtifactStore,
    InMemoryArtifactStore,
    NotFound,
)
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.pointer import last_term, update_pointer
from streams.stores.artifacts.promotion import CurrentPointer, PromotionResult

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from torch import Tensor

log = structlog.get_logger()

WEIGHTS_FILE = "model.safetensors"
DECISION_FILE = "verdict.json"
MANIFEST_FILE = "manifest.json"
POINTER_FILE = "current.json"
ENTRIES = "releases"
_RELEASE_NAME = re.compile(RELEASE_ID)

Weights: TypeAlias = "dict[str, Tensor]"
M = TypeVar("M", bound=Message)


def pack_weights(weights: Mapping[str, Tensor]) -> bytes:
    """Make the bytes of `model.safetensors`: equal weights give equal bytes."""
    import safetensors.torch

    plain = {name: weights[name].detach().cpu().contiguous().clone() for name in sorted(weights)}
    packed: bytes = safetensors.torch.save(plain)
    return packed


def weights_checksum(packed: bytes) -> str:
    """SHA-256 of packed weights, as hex digits."""
    return hashlib.sha256(packed).hexdigest()


class ModelRegistry:
    """Releases in an artifact store: a trainer puts them there, servers load them. All calls block.

    `named` is the place in messages, with its setting.
    """

    def __init__(
        self, artifacts: ArtifactStore, config: ModelStoreConfig, *, named: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._artifacts = artifacts
        self._config = config
        self._named = named
        self._clock = clock

    def check(self) -> None:
        """Write and remove a probe: whether a trainer, or a user who moves the pointer, can rely on the store.

        Raises `Misconfigured` or `StoreUnavailable`.
        """
        self._artifacts.check()

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        """Make a release readable under `manifest.release_id`, but not current. Publishing it twice changes nothing.

        Raises `ValueError` if `manifest.weights_sha256` is not the checksum of `weights`, `StoreUnavailable` if it
        cannot be written now.
        """
        files = {WEIGHTS_FILE: _packed_as_declared(weights, manifest)}
        self._artifacts.put(manifest.release_id, files | {MANIFEST_FILE: manifest.model_dump_json(indent=2).encode()})

    def record_decision(self, release_id: str, decision: PromotionDecision) -> PromotionDecision:
        """Attach the promotion gate's decision; the first one stays, and is returned. Raises as `promote` does."""
        self._artifacts.attach(release_id, DECISION_FILE, decision.model_dump_json(indent=2).encode())
        return self._parsed(release_id, DECISION_FILE, PromotionDecision)

    def promote(self, release_id: str, fence: Fence | None, *, against: str | None = None) -> PromotionResult:
        """Make a published release the current one, unless a user pinned another.

        `against` names the release that it was compared with; if that is not current any more, the pointer stays.
        Raises `Fenced` if the pointer was written under a larger fence, `StoreUnavailable` if the release is not there.
        """
        manifest = self.manifest(release_id)
        result, replaced = PromotionResult.MOVED, None

        def change(before: CurrentPointer | None) -> CurrentPointer | None:
            nonlocal result, replaced
            after = promotion.released(before, manifest, fence, against=against, by=current_user(), at=self._now())
            replaced = None if before is None else before.release_id
            if isinstance(after, PromotionResult):
                result = after
                return None
            result = PromotionResult.MOVED
            return after

        self._update(change)
        self.prune(keep=replaced)
        return result

    def last_term(self) -> int:
        """A number that no trainer's term so far is above; 0 before the first promotion."""
        current = self.current()
        return 0 if current is None else last_term(current.fence, current.sequence)

    def take_over(self, fence: Fence | None) -> None:
        """Put a new trainer's fence on the pointer. Raises `Fenced` as `promote` does."""
        self._update(lambda before: promotion.taken_over(before, fence, by=current_user(), at=self._now()))

    def choose(
        self, release_id: str, *, seen: CurrentPointer | None, rollback: bool, why: str | None, by: str | None = None
    ) -> CurrentPointer:
        """Promotion of any kept release by a user, under the fence that is there; a rollback pins.

        Raises `PipelineError` if the pointer is not as `seen` any more, `StoreUnavailable` if the release is not there.
        """
        manifest = self.manifest(release_id)
        after = self._update(
            lambda before: promotion.chosen(
                before, manifest, seen=seen, rollback=rollback, by=by or current_user(), at=self._now(), why=why
            )
        )
        assert after is not None
        return after

    def pin(self, on: bool, *, why: str | None, by: str | None = None) -> bool:
        """Keep trainers from moving the pointer, or allow it again; False if nothing changes."""
        by = by or current_user()
        after = self._update(lambda before: promotion.pinned(before, on, by=by, at=self._now(), why=why))
        return after is not None

    def current(self) -> CurrentPointer | None:
        """The release to serve; None before the first promotion."""
        found = self._artifacts.pointer()
        return None if found is None else self._pointer(found.content)

    def load(self, release_id: str) -> tuple[Weights, ModelManifest]:
        """Weights and manifest of a release, verified by its checksum.

        Raises `StoreUnavailable` if it is not (or no longer) there: ask `current()` again; `Misconfigured` if it is
        damaged.
        """
        manifest = self.manifest(release_id)
        packed = self._artifacts.read(release_id, WEIGHTS_FILE)
        if weights_checksum(packed) != manifest.weights_sha256:
            raise self._damaged(release_id, WEIGHTS_FILE, "its checksum differs from the manifest's")
        import safetensors.torch

        try:
            weights: Weights = safetensors.torch.load(packed)
        except safetensors.SafetensorError as error:
            raise self._damaged(release_id, WEIGHTS_FILE, str(error)) from None
        return weights, manifest

    def manifest(self, release_id: str) -> ModelManifest:
        """The manifest alone. Raises as `load` does."""
        manifest = self._parsed(release_id, MANIFEST_FILE, ModelManifest)
        if manifest.release_id != release_id:
            raise self._damaged(release_id, MANIFEST_FILE, f"it names release {manifest.release_id}")
        return manifest

    def decision(self, release_id: str) -> PromotionDecision | None:
        """The promotion gate's decision; None for a release without one."""
        try:
            return self._parsed(release_id, DECISION_FILE, PromotionDecision)
        except NotFound:
            return None

    def list(self) -> list[ModelManifest]:
        """All kept releases, oldest first."""
        found = []
        for name in self._artifacts.names():
            if _RELEASE_NAME.match(name):
                with contextlib.suppress(NotFound):  # deleted by another process just now
                    found.append(self.manifest(name))
        return found

    def been_current(self) -> set[str]:
        """Releases that are or were current."""
        current = self.current()
        past = {name.split("-", 1)[1].removesuffix(".json") for name in self._artifacts.audit_names()}
        return past if current is None else past | {current.release_id}

    def history(self) -> Sequence[CurrentPointer]:
        """Every state of the pointer, oldest first; the last one is the present one. Reads a small file for each."""
        current = self.current()
        past = [self._pointer(record) for record in self._artifacts.audit_trail()]
        if current is None:
            return past
        return [*(pointer for pointer in past if pointer.sequence < current.sequence), current]

    def prune(self, *, keep: str | None = None) -> None:
        """Delete releases that are too old, except `keep`."""
        releases = self.list()
        too_old = [
            release.release_id
            for release, successor in pairwise(releases)
            if release not in releases[-self._config.keep_releases :]
            and release.release_id != keep
            and self._clock() - successor.created_at.timestamp() >= self._config.grace_seconds
        ]
        if not too_old:
            return
        by = current_user()
        after = self._update(lambda before: promotion.pruned(before, releases, too_old, by=by, at=self._now()))
        for release_id in [] if after is None else after.doomed:
            self._artifacts.delete(release_id)
            log.info("models.forgotten", release_id=release_id)
        self._artifacts.sweep(max(self._config.grace_seconds, 60.0))

    def _update(self, change: Callable[[CurrentPointer | None], CurrentPointer | None]) -> CurrentPointer | None:
        """Change the pointer; its state is appended to the audit trail first, so that a crash leaves no gap there."""

        def changed(raw: bytes | None) -> bytes | None:
            before = None if raw is None else self._pointer(raw)
            after = change(before)
            if after is None:
                return None
            if before is not None and raw is not None:
                self._artifacts.append_audit(f"{before.sequence:08d}-{before.release_id}.json", raw)
            return after.model_dump_json(indent=2).encode()

        written = update_pointer(self._artifacts, changed)
        return None if written is None else self._pointer(written)

    def _parsed(self, release_id: str, file: str, model: type[M]) -> M:
        if not _RELEASE_NAME.match(release_id):
            raise ValueError(f"not a release id: {release_id!r}")
        text = self._artifacts.read(release_id, file)
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            raise self._damaged(release_id, file, f"{error.error_count()} fields are wrong") from None

    def _pointer(self, text: bytes) -> CurrentPointer:
        try:
            return CurrentPointer.model_validate_json(text)
        except ValidationError as error:
            raise Misconfigured(
                f"{POINTER_FILE} in {self._named} is not a release pointer ({error.error_count()} errors): restore it "
                "from a copy, or remove it and let `mimstream train` release again"
            ) from None

    def _damaged(self, release_id: str, file: str, why: str) -> Misconfigured:
        return Misconfigured(
            f"{release_id}/{file} in {self._named} is damaged: {why}; remove this release, or restore it from a copy"
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def folder_registry(
    config: ModelStoreConfig,
    *,
    clock: Callable[[], float] = time.time,
    at_step: Callable[[str], None] = lambda step: None,
) -> ModelRegistry:
    """A registry in the folder `config.folder`; `at_step` is that of `FolderArtifactStore`."""
    named = f"{config.folder} (MIM_MODELS__FOLDER)"
    artifacts = FolderArtifactStore(
        config.folder,
        entries=ENTRIES,
        pointer=POINTER_FILE,
        named=named,
        lock_timeout_seconds=config.lock_timeout_seconds,
        at_step=at_step,
    )
    return ModelRegistry(artifacts, config, named=named, clock=clock)


def in_memory_registry() -> ModelRegistry:
    """A registry in the memory of one process."""
    return ModelRegistry(InMemoryArtifactStore(), ModelStoreConfig(), named="memory")


def open_registry(config: ModelStoreConfig) -> ModelRegistry:
    """The registry that the settings name. Raises `Misconfigured` if an object store cannot be used."""
    if config.url is None:
        return folder_registry(config)
    from streams.stores.artifacts.object_store import S3ArtifactStore  # its clients are an extra

    named = f"{config.url} (MIM_MODELS__URL)"
    artifacts = S3ArtifactStore(
        config.url,
        entries=ENTRIES,
        pointer=POINTER_FILE,
        named=named,
        options=config.storage_options,
        timeout_seconds=config.timeout_seconds,
    )
    return ModelRegistry(artifacts, config, named=named)


def current_user() -> str:
    """The user of this process as `user@host`, for the audit trail."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container without a name for the user
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _packed_as_declared(weights: Mapping[str, Tensor], manifest: ModelManifest) -> bytes:
    packed = pack_weights(weights)
    checksum = weights_checksum(packed)
    if checksum != manifest.weights_sha256 or not manifest.release_id.endswith(checksum[:12]):
        raise ValueError(f"manifest {manifest.release_id} does not belong to weights {checksum}")
    return packed


def find_release(store: ModelRegistry, named: str | None) -> ModelManifest:
    """The release whose name begins with `named`; the current one for None.

    Raises `PipelineError` if there is none or more than one.
    """
    if named is None:
        current = store.current()
        if current is None:
            raise PipelineError("nothing has been released yet")
        return store.manifest(current.release_id)
    kept = store.list()
    found = [manifest for manifest in kept if manifest.release_id.partition("-")[0] == named]  # r100000, not r1000000
    found = found or [manifest for manifest in kept if manifest.release_id.startswith(named)]
    if len(found) != 1:
        what = "no release" if not found else "more than one release"
        raise PipelineError(f"{what} that is kept is called {named!r}: see 'mimstream models list'")
    return found[0]
