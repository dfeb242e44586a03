"""Released models: immutable entries, and one pointer that says which of them is current.

```text
releases/r000007-3f2a.../model.safetensors     never changes once it has this name
                         manifest.json
                         verdict.json          attached later: how it compared with what answered then
current.json             {"release_id", "fence", "pinned", who, when, why, ...}, compared and swapped
history/00000012-r000007-3f2a....json   what `current.json` was before its 13th change: written before it, never changed
```

In a folder that trainer and servers share, or in an object store (`artifact_store` has the promises that both
keep, `streams.stores.artifacts.promotion` the rules for the pointer).
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
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

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
    exchange,
)
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.promotion import CurrentPointer, PromotionResult

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from torch import Tensor

__all__ = [
    "CurrentPointer",
    "FolderModelStore",
    "InMemoryModelStore",
    "ModelStore",
    "PromotionResult",
    "ShelvedModels",
    "open_models",
    "pack_weights",
    "weights_checksum",
]

log = structlog.get_logger()

WEIGHTS_FILE = "model.safetensors"
VERDICT_FILE = "verdict.json"
MANIFEST_FILE = "manifest.json"
POINTER_FILE = "current.json"
ENTRIES = "releases"
_RELEASE_NAME = re.compile(RELEASE_ID)

Weights: TypeAlias = "dict[str, Tensor]"
M = TypeVar("M", bound=Message)


class ModelStore(Protocol):
    """Where a trainer puts releases and a server finds them. All calls block: use a thread from inside a loop."""

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        """Make a release readable under `manifest.release_id`; nobody serves it yet. Publishing it twice is harmless.

        Raises `ValueError` if `manifest.weights_sha256` is not the checksum of `weights`, `StoreUnavailable` if it
        cannot be written now.
        """
        ...

    def promote(self, release_id: str, fence: Fence | None, *, against: str | None = None) -> PromotionResult:
        """Make a published release the current one, unless a person pinned another.

        `against` names the release that it was compared with; if another answers now, the pointer stays too. Raises
        `Fenced` if the pointer was written under a larger fence, `StoreUnavailable` if the release is not there.
        """
        ...

    def take_over(self, fence: Fence | None) -> None:
        """Put a new trainer's fence on whatever is current. Raises `Fenced` as `promote` does."""
        ...

    def choose(
        self, release_id: str, *, seen: CurrentPointer | None, rollback: bool, why: str | None, by: str | None = None
    ) -> CurrentPointer:
        """A person's promotion of any release that is kept, under the fence that is there; a rollback pins.

        Raises `PipelineError` if the pointer is not as `seen` any more, `StoreUnavailable` if the release is not there.
        """
        ...

    def pin(self, on: bool, *, why: str | None, by: str | None = None) -> bool:
        """Keep trainers from moving the pointer, or let them again; False if it was so already."""
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

    def manifest(self, release_id: str) -> ModelManifest:
        """The manifest alone. Raises as `load` does."""
        ...

    def decide(self, release_id: str, verdict: PromotionDecision) -> PromotionDecision:
        """Keep what the promotion gate says of a release, once; the verdict that counts. Raises as `promote` does."""
        ...

    def verdict(self, release_id: str) -> PromotionDecision | None:
        """What the promotion gate said; None for a release that no gate has decided about."""
        ...

    def list(self) -> list[ModelManifest]:
        """All releases that are kept, oldest first."""
        ...

    def been_current(self) -> set[str]:
        """Releases that the pointer ever came to."""
        ...

    def history(self) -> Sequence[CurrentPointer]:
        """Every state of the pointer, oldest first; the last one is the current. Reads a small file for each."""
        ...

    def prune(self) -> None:
        """Forget releases that are too old."""
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


class ShelvedModels:
    """`ModelStore` over a shelf. `named` is how messages call the place, with the setting that names it."""

    def __init__(
        self, shelf: ArtifactStore, config: ModelStoreConfig, *, named: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._shelf = shelf
        self._config = config
        self._named = named
        self._clock = clock

    def publish(self, weights: Mapping[str, Tensor], manifest: ModelManifest) -> None:
        """See `ModelStore`."""
        files = {WEIGHTS_FILE: _packed_as_declared(weights, manifest)}
        self._shelf.put(manifest.release_id, files | {MANIFEST_FILE: manifest.model_dump_json(indent=2).encode()})

    def decide(self, release_id: str, verdict: PromotionDecision) -> PromotionDecision:
        """See `ModelStore`."""
        self._shelf.attach(release_id, VERDICT_FILE, verdict.model_dump_json(indent=2).encode())
        return self._parsed(release_id, VERDICT_FILE, PromotionDecision)

    def promote(self, release_id: str, fence: Fence | None, *, against: str | None = None) -> PromotionResult:
        """See `ModelStore`."""
        manifest = self.manifest(release_id)
        outcome, replaced = PromotionResult.MOVED, None

        def change(before: CurrentPointer | None) -> CurrentPointer | None:
            nonlocal outcome, replaced
            after = promotion.released(before, manifest, fence, against=against, by=whoever(), at=self._now())
            replaced = None if before is None else before.release_id
            if isinstance(after, PromotionResult):
                outcome = after
                return None
            outcome = PromotionResult.MOVED
            return after

        self._exchange(change)
        self._prune(keep=replaced)
        return outcome

    def take_over(self, fence: Fence | None) -> None:
        """See `ModelStore`."""
        self._exchange(
            lambda before: None if before is None else promotion.taken_over(before, fence, by=whoever(), at=self._now())
        )

    def choose(
        self, release_id: str, *, seen: CurrentPointer | None, rollback: bool, why: str | None, by: str | None = None
    ) -> CurrentPointer:
        """See `ModelStore`."""
        manifest = self.manifest(release_id)
        after = self._exchange(
            lambda before: promotion.chosen(
                before, manifest, seen=seen, rollback=rollback, by=by or whoever(), at=self._now(), why=why
            )
        )
        assert after is not None
        return after

    def pin(self, on: bool, *, why: str | None, by: str | None = None) -> bool:
        """See `ModelStore`."""
        after = self._exchange(lambda before: promotion.pinned(before, on, by=by or whoever(), at=self._now(), why=why))
        return after is not None

    def current(self) -> CurrentPointer | None:
        """See `ModelStore`."""
        held = self._shelf.pointer()
        return None if held is None else self._pointer(held.content)

    def load(self, release_id: str) -> tuple[Weights, ModelManifest]:
        """See `ModelStore`."""
        manifest = self.manifest(release_id)
        packed = self._shelf.read(release_id, WEIGHTS_FILE)
        if weights_checksum(packed) != manifest.weights_sha256:
            raise self._damaged(release_id, WEIGHTS_FILE, "its checksum differs from the manifest's")
        import safetensors.torch

        try:
            weights: Weights = safetensors.torch.load(packed)
        except safetensors.SafetensorError as error:
            raise self._damaged(release_id, WEIGHTS_FILE, str(error)) from None
        return weights, manifest

    def manifest(self, release_id: str) -> ModelManifest:
        """See `ModelStore`."""
        manifest = self._parsed(release_id, MANIFEST_FILE, ModelManifest)
        if manifest.release_id != release_id:
            raise self._damaged(release_id, MANIFEST_FILE, f"it names release {manifest.release_id}")
        return manifest

    def verdict(self, release_id: str) -> PromotionDecision | None:
        """See `ModelStore`."""
        try:
            return self._parsed(release_id, VERDICT_FILE, PromotionDecision)
        except NotFound:
            return None

    def list(self) -> list[ModelManifest]:
        """See `ModelStore`."""
        found = []
        for name in self._shelf.names():
            if _RELEASE_NAME.match(name):
                with contextlib.suppress(NotFound):  # forgotten by another process just now
                    found.append(self.manifest(name))
        return found

    def been_current(self) -> set[str]:
        """See `ModelStore`."""
        current = self.current()
        past = {name.split("-", 1)[1].removesuffix(".json") for name in self._shelf.note_names()}
        return past if current is None else past | {current.release_id}

    def history(self) -> Sequence[CurrentPointer]:
        """See `ModelStore`."""
        current = self.current()
        past = [self._pointer(note) for note in self._shelf.notes()]
        if current is None:
            return past
        return [*(pointer for pointer in past if pointer.sequence < current.sequence), current]

    def prune(self) -> None:
        """See `ModelStore`."""
        self._prune(keep=None)

    def _prune(self, keep: str | None) -> None:
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
        after = self._exchange(
            lambda before: (
                None if before is None else promotion.pruned(before, releases, too_old, by=whoever(), at=self._now())
            )
        )
        for release_id in [] if after is None else after.doomed:
            self._shelf.drop(release_id)
            log.info("models.forgotten", release_id=release_id)
        self._shelf.sweep(max(self._config.grace_seconds, 60.0))

    def _exchange(self, change: Callable[[CurrentPointer | None], CurrentPointer | None]) -> CurrentPointer | None:
        """Change the pointer; what it replaces is noted first, so that the trail has no gap whoever is killed when."""

        def swapped(raw: bytes | None) -> bytes | None:
            before = None if raw is None else self._pointer(raw)
            after = change(before)
            if after is None:
                return None
            if before is not None and raw is not None:
                self._shelf.note(f"{before.sequence:08d}-{before.release_id}.json", raw)
            return after.model_dump_json(indent=2).encode()

        written = exchange(self._shelf, swapped)
        return None if written is None else self._pointer(written)

    def _parsed(self, release_id: str, file: str, model: type[M]) -> M:
        if not _RELEASE_NAME.match(release_id):
            raise ValueError(f"not a release id: {release_id!r}")
        text = self._shelf.read(release_id, file)
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


class FolderModelStore(ShelvedModels):
    """Releases in a folder. `at_step` is told each step just before it reaches the disk."""

    def __init__(
        self,
        config: ModelStoreConfig,
        *,
        clock: Callable[[], float] = time.time,
        at_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        named = f"{config.folder} (MIM_MODELS__FOLDER)"
        shelf = FolderArtifactStore(
            config.folder,
            entries=ENTRIES,
            pointer=POINTER_FILE,
            named=named,
            lock_timeout_seconds=config.lock_timeout_seconds,
            at_step=at_step,
        )
        super().__init__(shelf, config, named=named, clock=clock)


class InMemoryModelStore(ShelvedModels):
    """Releases in one process's memory."""

    def __init__(self) -> None:
        super().__init__(InMemoryArtifactStore(), ModelStoreConfig(), named="memory")


def open_models(config: ModelStoreConfig) -> ModelStore:
    """The model store that the settings name. Raises `Misconfigured` if an object store cannot be used."""
    if config.url is None:
        return FolderModelStore(config)
    from streams.stores.artifacts.object_store import S3ArtifactStore  # its clients are an extra

    named = f"{config.url} (MIM_MODELS__URL)"
    shelf = S3ArtifactStore(
        config.url, entries=ENTRIES, pointer=POINTER_FILE, named=named, options=config.storage_options
    )
    return ShelvedModels(shelf, config, named=named)


def whoever() -> str:
    """Who runs this process: `user@host`, for the audit trail."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _packed_as_declared(weights: Mapping[str, Tensor], manifest: ModelManifest) -> bytes:
    packed = pack_weights(weights)
    checksum = weights_checksum(packed)
    if checksum != manifest.weights_sha256 or not manifest.release_id.endswith(checksum[:12]):
        raise ValueError(f"manifest {manifest.release_id} does not belong to weights {checksum}")
    return packed


def find_release(store: ModelStore, named: str | None) -> ModelManifest:
    """The release of that name, or the one whose name begins so; the current one if none is named.

    Raises `PipelineError` if none or more than one is meant.
    """
    if named is None:
        current = store.current()
        if current is None:
            raise PipelineError("nothing has been released yet")
        return store.manifest(current.release_id)
    found = [manifest for manifest in store.list() if manifest.release_id.startswith(named)]
    if len(found) != 1:
        what = "no release" if not found else "more than one release"
        raise PipelineError(f"{what} that is kept is called {named!r}: see 'mimstream models list'")
    return found[0]
