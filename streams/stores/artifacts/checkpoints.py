"""Checkpoints of the trainer: its whole state with the offsets that it had read to, as one immutable entry.

```text
snapshots/n000012-3f2a.../state.safetensors    arrays: weights, optimiser, bank, window, what waits, ...
                          values.json          numbers and texts that belong to them, the state of generators
                          snapshot.json        offsets, log, encoder, configuration, checksums, fence, pieces
pieces/p000012-9b1c.../                        rows of what is large: catalogue, histories, ... (`pieces`)
current.json                                   the one to resume from, and the fence it was written under
```

Pieces exist before the entry that names them, and are deleted after the last one that does. The pointer moves only
after the entry exists, and never back to an earlier trainer. No two trainers write under one name: a superseded trainer
deletes its own entry, and none of its successor's.

Nothing is pickled, so loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import Field, ValidationError

from schemas.base import EncoderVersion, Message, UtcTime
from schemas.errors import Fenced, Misconfigured, StoreUnavailable
from schemas.manifests import NUMBERED, Fence, TopicOffsets, running_number
from streams.stores.artifacts.arrays import pack_arrays, unpack_arrays
from streams.stores.artifacts.artifact_store import ArtifactStore, NotFound, VersionedPointer
from streams.stores.artifacts.pieces import PieceRef, Pieces, TableHeld, held_of, refs_in
from streams.stores.artifacts.pointer import last_term, refuse_smaller_fence, update_pointer

if TYPE_CHECKING:  # settings import this package; no command should pay for the trainer because of that
    from trainer.state import State

log = structlog.get_logger()

STATE_FILE = "state.safetensors"
VALUES_FILE = "values.json"
META_FILE = "snapshot.json"
FORMAT = 5
"""Incremented when the contents of a checkpoint change incompatibly."""
_NAME = re.compile(rf"^n{NUMBERED}$")
_LEFTOVER_SECONDS = 600.0


class CheckpointMeta(Message):
    """`snapshot.json`: enough to decide whether a trainer may resume from it."""

    format: int = FORMAT
    """Version of the other files' contents."""
    snapshot_id: str = Field(default="", pattern=rf"^(n{NUMBERED})?$")
    """Running number and the head of a hash of contents and `fence`."""
    state_sha256: str = ""
    """Checksum of `state.safetensors`."""
    values_sha256: str = ""
    """Checksum of `values.json`."""
    created_at: UtcTime
    """Wall clock when it was written."""
    encoder_version: EncoderVersion
    """Encoder version of the item vectors."""
    dim: int = Field(ge=1, le=8192)
    """Width of those vectors."""
    offsets: TopicOffsets
    """Next offset to read in each partition."""
    cluster_id: str | None
    """The Kafka cluster that `offsets` belong to."""
    topic_ids: dict[str, str]
    """The topics' own ids: a topic that was deleted and created again has another one."""
    config: dict[str, Any]
    """Settings that decide what is learned; a trainer with other ones does not resume from here."""
    code_sha256: str
    """Hash of the code that decides what is learned; a different one is logged, and training resumes."""
    rows_trained: int = Field(ge=0)
    """Rows learned from so far."""
    rows_sha256: str
    """Hash over these rows."""
    fence: Fence | None = None
    """Fence of the trainer that wrote it."""
    tables: dict[str, TableHeld] = Field(default_factory=dict)
    """The tables whose rows are in `pieces`."""
    pieces: list[PieceRef] = Field(default_factory=list)
    """Files with their rows, the oldest first."""


class BaseGone(StoreUnavailable):
    """The snapshot that another one was to go on from is not there any more, or not whole."""


class _Pointer(Message):
    """Contents of `current.json`."""

    snapshot_id: str
    """The checkpoint to resume from; empty before the first."""
    fence: Fence | None = None
    """Fence of the trainer that wrote this."""
    sequence: int = 0
    """Running number of the pointer's changes."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The pointer at one moment, and a number that no term claimed until then is above."""

    pointer: VersionedPointer | None
    term: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, read and verified."""

    meta: CheckpointMeta
    state: State

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """For restoring parts of a trainer: contents that do not fit raise `Misconfigured`."""
        try:
            yield
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise Misconfigured(
                f"snapshot {self.meta.snapshot_id} cannot be read by this version: {error!r}. Use the version that "
                "took it, or train anew with an empty MIM_TRAIN__SNAPSHOT_FOLDER"
            ) from error


class CheckpointStore:
    """Checkpoints in an artifact store. All calls block: use a thread from inside a loop.

    `keep` is the number of newest ones that are kept; `named` is the place in messages, with its setting.
    """

    def __init__(self, artifacts: ArtifactStore, pieces: ArtifactStore, *, keep: int, named: str) -> None:
        self._artifacts = artifacts
        self._pieces = Pieces(pieces)
        self._keep = keep
        self._named = named

    def last_claim(self) -> Claimed:
        """The pointer as it is now, to be named in `claim`."""
        found = self._artifacts.pointer()
        pointer = None if found is None else self._pointer(found.content)
        return Claimed(found, 0 if pointer is None else last_term(pointer.fence, pointer.sequence))

    def claim(self, fence: Fence, *, seen: Claimed) -> bool:
        """Put a new trainer's fence on the pointer, so that earlier ones cannot move it; False if it is not as `seen`.

        Whoever proved its leadership after it had `seen` the pointer cannot replace a later trainer's claim.
        """
        raw = None if seen.pointer is None else seen.pointer.content
        return self._artifacts.compare_and_swap(self._succeeding(raw, None, fence), expected=seen.pointer)

    def write(
        self,
        state: State,
        meta: CheckpointMeta,
        fence: Fence | None,
        *,
        since: str | None = None,
        erased: Collection[str] = (),
    ) -> CheckpointMeta:
        """Write a checkpoint, make it the one to resume from, and delete the oldest; returns the completed `meta`.

        `since` is the checkpoint that holds the rows of tables that `state` lacks; rows of the users `erased` are
        removed from what is taken over from it. Raises `Fenced` if a later trainer has written here, `BaseGone` if
        `since` is not there, `StoreUnavailable` if it cannot be written now; the previous checkpoints then stay
        readable.
        """
        packed = pack_arrays(state.small_arrays)
        values = json.dumps(state.values, allow_nan=False).encode()
        sums = hashlib.sha256(packed).hexdigest(), hashlib.sha256(values).hexdigest()
        writer = "" if fence is None else f"{fence.producer_id} {fence.epoch} {fence.term}"
        own = hashlib.sha256(" ".join((*sums, writer)).encode()).hexdigest()
        number = self._next_number()
        entry = f"p{number:06d}-{hashlib.sha256((own + meta.model_dump_json()).encode()).hexdigest()[:12]}"
        try:
            before = [] if since is None else self._meta(since).pieces
            pieces = self._pieces.write(entry, state.copies, after=before, erased=erased, fence=fence)
        except (NotFound, Misconfigured, ValueError) as error:
            raise BaseGone("store", f"snapshot {since} in {self._named} is not whole any more ({error})") from error
        meta = meta.model_copy(
            update={
                "snapshot_id": f"n{number:06d}-{own[:12]}",
                "state_sha256": sums[0],
                "values_sha256": sums[1],
                "fence": fence,
                "tables": {name: held_of(copy.held) for name, copy in state.copies.items()},
                "pieces": pieces,
            }
        )
        files = {STATE_FILE: packed, VALUES_FILE: values, META_FILE: meta.model_dump_json(indent=2).encode()}
        try:
            self._artifacts.put(meta.snapshot_id, files)
        except StoreUnavailable:
            with suppress(StoreUnavailable):
                self._artifacts.delete(meta.snapshot_id)  # it may be there: only the last step failed
                self._pieces.delete(entry)  # a full disk gets its room back
            raise
        try:
            gone = {ref.entry for ref in pieces}.difference(self._pieces.names())
            if gone:  # another process removed them before the new entry named them
                found = self._artifacts.pointer()
                self._succeeding(None if found is None else found.content, None, fence)
                raise BaseGone("store", f"{sorted(gone)} of snapshot {since} in {self._named} are not there any more")
            update_pointer(self._artifacts, lambda raw: self._succeeding(raw, meta.snapshot_id, fence))
        except (Fenced, BaseGone):
            self._artifacts.delete(meta.snapshot_id)
            self._pieces.delete(entry)
            raise
        self._delete_old(meta.snapshot_id, fence)
        log.info("snapshot.written", snapshot=meta.snapshot_id, rows=meta.rows_trained, since=since)
        return meta

    def current_id(self) -> str | None:
        """The checkpoint to resume from; None before the first."""
        found = self._artifacts.pointer()
        return None if found is None else self._pointer(found.content).snapshot_id or None

    def kept(self) -> list[CheckpointMeta]:
        """All kept checkpoints, oldest first."""
        found = []
        for name in self._names():
            with suppress(NotFound):  # deleted by another process just now
                found.append(self._meta(name))
        return found

    def load(self, snapshot_id: str) -> Checkpoint:
        """Read and verify a checkpoint.

        Raises `Misconfigured` if it is damaged or of another format, `StoreUnavailable` if it is not there.
        """
        if not _NAME.match(snapshot_id):
            raise Misconfigured(f"{snapshot_id!r} is no id of a snapshot; there are {self._names()} in {self._named}")
        meta = self._meta(snapshot_id)
        if meta.format != FORMAT:
            raise Misconfigured(
                f"snapshot {snapshot_id} in {self._named} has format {meta.format}, this version reads {FORMAT}: "
                f"{self._way_out}"
            )
        packed, values = self._artifacts.read(snapshot_id, STATE_FILE), self._artifacts.read(snapshot_id, VALUES_FILE)
        found = (hashlib.sha256(packed).hexdigest(), hashlib.sha256(values).hexdigest())
        if found != (meta.state_sha256, meta.values_sha256):
            raise self._damaged(snapshot_id, "its checksums differ from those it was written with")
        from trainer.state import State

        try:
            arrays = unpack_arrays(packed)
            del packed
            arrays |= self._pieces.read(meta.tables, meta.pieces)
            return Checkpoint(meta, State(arrays, _parsed(values)))
        except NotFound as error:
            raise self._damaged(snapshot_id, f"a part of it is gone ({error})") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._damaged(snapshot_id, f"its contents are not what they should be ({error})") from error

    @property
    def _way_out(self) -> str:
        return "resume from another with `mimstream train --from-snapshot ID`, or remove the folder to train anew"

    def _names(self) -> list[str]:
        return [name for name in self._artifacts.names() if _NAME.match(name)]

    def _next_number(self) -> int:
        return 1 + max(map(running_number, self._names()), default=0)

    def _succeeding(self, raw: bytes | None, snapshot_id: str | None, fence: Fence | None) -> bytes:
        before = None if raw is None else self._pointer(raw)
        if before is not None:
            refuse_smaller_fence(before.fence, fence, subject=f"{self._named} belongs to")
        chosen = snapshot_id or (before.snapshot_id if before else "")
        after = _Pointer(snapshot_id=chosen, fence=fence, sequence=0 if before is None else before.sequence + 1)
        return after.model_dump_json(indent=2).encode()

    def _delete_old(self, current: str, fence: Fence | None) -> None:
        pieces = self._pieces.names()  # first: they are written before the entries that name them
        for name in self._names()[: -self._keep]:
            if name != current:
                self._artifacts.delete(name)
        needed: set[str] = set()
        for name in self._names():
            with suppress(NotFound, ValueError):  # a damaged one cannot be loaded, with its files or without
                needed |= refs_in(self._artifacts.read(name, META_FILE))
        self._pieces.retain(needed, pieces, fence)
        self._artifacts.sweep(_LEFTOVER_SECONDS)
        self._pieces.sweep(_LEFTOVER_SECONDS)

    def _pointer(self, raw: bytes) -> _Pointer:
        try:
            return _Pointer.model_validate_json(raw)
        except ValidationError as error:
            raise Misconfigured(
                f"the pointer to snapshots in {self._named} is damaged ({error.error_count()} errors): restore it from "
                "a copy, or remove the folder to train anew"
            ) from None

    def _meta(self, snapshot_id: str) -> CheckpointMeta:
        try:
            meta = CheckpointMeta.model_validate_json(self._artifacts.read(snapshot_id, META_FILE))
        except ValidationError as error:
            raise self._damaged(snapshot_id, f"{error.error_count()} fields of {META_FILE} are wrong") from None
        if meta.snapshot_id != snapshot_id:
            raise self._damaged(snapshot_id, f"it names itself {meta.snapshot_id}")
        return meta

    def _damaged(self, snapshot_id: str, why: str) -> Misconfigured:
        return Misconfigured(f"snapshot {snapshot_id} in {self._named} is damaged: {why}; {self._way_out}")


_NOT_IN_TRAINING = ("offline", "datasets")


def _parsed(values: bytes) -> dict[str, Any]:
    found = json.loads(values)
    if not isinstance(found, dict):
        raise ValueError(f"{VALUES_FILE} is no object")
    return found


def code_hash() -> str:
    """Hash over the source of everything that decides what is learned: the packages `schemas` and `trainer`."""
    import schemas
    import trainer

    return hash_sources([Path(str(package.__file__)).parent for package in (schemas, trainer)])


def hash_sources(packages: Sequence[Path]) -> str:
    """Hash over the Python files of packages, sub-packages included, by name and content.

    Evaluation and the reading of data-set folders take no part in training from the stream, and are left out.
    """
    digest = hashlib.sha256()
    for root in packages:
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if name.parts[0] not in _NOT_IN_TRAINING:
                digest.update(f"{root.name}/{name.as_posix()}".encode() + path.read_bytes())
    return digest.hexdigest()
