"""The journal of training: a segment per candidate, and the vectors that its rows were learned with.

```text
journal/s000020000-3f2a.../segment.safetensors    places of rows in the log, negatives, which vector from when on
                           values.json
                           segment.json           log, encoder, rules of the join, hashes, fence
vectors/v000001-9b1c.../vectors.safetensors       digests of vectors, and the vectors
                        writer.json               fence of the trainer that wrote them
```

A segment refers to a pack only where it uses at least half of its vectors, and writes the others again: packs take at
most twice the room of the vectors of all kept segments.

Segments and vectors are written before the release that they belong to, and deleted with it. The topic `embeddings`
keeps only the newest vector of an item; older ones that rows were learned with are here.

A trainer deletes only what itself or an earlier trainer has written, and refers only to vectors of its own: one that
was superseded deletes nothing that its successor needs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import Field, ValidationError

from schemas.base import EncoderVersion, Message
from schemas.errors import Misconfigured
from schemas.manifests import NUMBERED, Fence, running_number
from streams.stores.artifacts.arrays import pack_arrays, unpack_arrays
from streams.stores.artifacts.artifact_store import ArtifactStore, NotFound
from streams.stores.artifacts.pointer import may_replace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trainer.provenance.journal import Segment

log = structlog.get_logger()

SEGMENT_FILE = "segment.safetensors"
VALUES_FILE = "values.json"
META_FILE = "segment.json"
VECTORS_FILE = "vectors.safetensors"
WRITER_FILE = "writer.json"
_SEGMENT = re.compile(r"^s[0-9]{9,12}-[0-9a-f]{12}$")
_PACK = re.compile(rf"^v{NUMBERED}$")


class SegmentMeta(Message):
    """`segment.json`: enough to read the log again in the same way."""

    segment_id: str
    """First row and the head of `root`."""
    root: str
    """Hash over rows, negatives and vectors."""
    rows: int
    """Number of rows."""
    sha256: str = ""
    """Checksum of the other two files together."""
    encoder_version: EncoderVersion
    """Encoder version of the vectors."""
    dim: int
    """Width of those vectors."""
    cluster_id: str | None
    """The Kafka cluster of the log."""
    topic_ids: dict[str, str]
    """The topics' own ids."""
    begins: dict[int, int]
    """Per partition of `behaviours`, where training began to read."""
    ends: dict[int, int]
    """Per partition, the next offset to read when the segment ended."""
    overtaken: list[tuple[int, int]] = Field(default_factory=list)
    """Partition and offset of events that were late because their partition had been idle."""
    rules: dict[str, float]
    """Settings of the trainer that the join depends on."""
    packs: list[str] = Field(default_factory=list)
    """Names of the packs with its vectors."""
    fence: Fence | None = None
    """Fence of the trainer that wrote it."""


@dataclass(frozen=True, slots=True)
class Present:
    """Names of the segments and packs of vectors that existed at one time."""

    segments: Collection[str]
    packs: Collection[str]


@dataclass(frozen=True, slots=True)
class KeptSegment:
    """A segment, read and verified; its vectors are read by `JournalStore.vectors`."""

    meta: SegmentMeta
    segment: Segment


class JournalStore:
    """Segments in one artifact store, vectors in another. All calls block. `named` is the place in messages."""

    def __init__(self, segments: ArtifactStore, vectors: ArtifactStore, *, named: str) -> None:
        self._segments = segments
        self._vectors = vectors
        self._named = named
        self._packed: dict[bytes, str] | None = None
        self._sizes: dict[str, int] = {}

    def write(self, segment: Segment, meta: SegmentMeta) -> None:
        """Write a segment and those of its vectors that it cannot refer to. Raises `StoreUnavailable`."""
        packs = self._archive(segment.archive, meta.fence)
        state = segment.to_state()
        packed, values = pack_arrays(state.arrays), json.dumps(state.values).encode()
        meta = meta.model_copy(update={"packs": packs, "sha256": hashlib.sha256(packed + values).hexdigest()})
        files = {SEGMENT_FILE: packed, VALUES_FILE: values, META_FILE: meta.model_dump_json(indent=2).encode()}
        self._segments.put(meta.segment_id, files)

    def load(self, segment_id: str) -> KeptSegment:
        """Read a segment. Raises `NotFound`, and `Misconfigured` if it is damaged."""
        from trainer.provenance.journal import Segment
        from trainer.state import State

        if not _SEGMENT.match(segment_id):
            raise Misconfigured(f"{segment_id!r} is no id of a journal segment")
        packed, values = (self._segments.read(segment_id, file) for file in (SEGMENT_FILE, VALUES_FILE))
        try:
            meta = SegmentMeta.model_validate_json(self._segments.read(segment_id, META_FILE))
        except ValidationError as error:
            raise self._damaged(segment_id, f"{error.error_count()} fields of {META_FILE} are wrong") from None
        if hashlib.sha256(packed + values).hexdigest() != meta.sha256:
            raise self._damaged(segment_id, "its checksum differs from the one it was written with")
        return KeptSegment(meta, Segment.from_state(State(unpack_arrays(packed), json.loads(values))))

    def vectors(self, meta: SegmentMeta) -> dict[bytes, NDArray[np.float32]]:
        """The vectors of a segment's packs by digest; missing packs are passed over."""
        found: dict[bytes, NDArray[np.float32]] = {}
        for name in meta.packs:
            with suppress(NotFound):
                arrays = self._pack(name)
                found |= {d.tobytes(): vector for d, vector in zip(arrays["digests"], arrays["vectors"], strict=True)}
        return found

    def present(self) -> Present:
        """What exists now; call it before listing releases. Raises `StoreUnavailable`."""
        packs = self._packs()  # first: a pack is written before the segments that need it
        return Present(self._segment_names(), packs)

    def retain(self, segment_ids: Collection[str], among: Present, fence: Fence | None) -> None:
        """Delete all other segments `among` these, and packs that no segment needs; none of a later trainer."""
        for name in among.segments:
            if name not in segment_ids and may_replace(self._segment_writer(name), fence):
                self._segments.delete(name)
        needed: set[str] = set()
        for name in self._segment_names():
            with suppress(NotFound):
                needed.update(json.loads(self._segments.read(name, META_FILE))["packs"])
        for name in among.packs:
            if name not in needed and may_replace(self._pack_writer(name), fence):
                self._vectors.delete(name)
                if self._packed is not None:
                    self._packed = {digest: pack for digest, pack in self._packed.items() if pack != name}
                log.info("journal.vectors_forgotten", pack=name)
        self._segments.sweep(600.0)
        self._vectors.sweep(600.0)

    def _archive(self, archive: Mapping[bytes, NDArray[np.float32]], fence: Fence | None) -> list[str]:
        import numpy as np

        packed = self._index(fence)
        used = Counter(packed[digest] for digest in archive if digest in packed)
        # a few vectors must not keep a large pack for ever: they are written again where most of their pack is not used
        mostly = {name for name, count in used.items() if 2 * count >= self._sizes[name]}
        fresh = sorted(digest for digest in archive if packed.get(digest) not in mostly)
        if fresh:
            digests = np.frombuffer(b"".join(fresh), np.uint8).reshape(len(fresh), -1)
            content = pack_arrays({"digests": digests, "vectors": np.stack([archive[digest] for digest in fresh])})
            writer = b"null" if fence is None else fence.model_dump_json().encode()
            number = 1 + max(map(running_number, self._packs()), default=0)
            name = f"v{number:06d}-{hashlib.sha256(content + writer).hexdigest()[:12]}"
            self._vectors.put(name, {VECTORS_FILE: content, WRITER_FILE: writer})
            packed |= dict.fromkeys(fresh, name)
            self._sizes[name] = len(fresh)
        return sorted({packed[digest] for digest in archive})

    def _index(self, fence: Fence | None) -> dict[bytes, str]:
        if self._packed is None:
            found: dict[bytes, str] = {}
            for name in self._packs():
                if self._pack_writer(name) != fence:
                    continue  # its writer may delete it at any time
                digests = [digest.tobytes() for digest in self._pack(name)["digests"]]
                found |= dict.fromkeys(digests, name)
                self._sizes[name] = len(digests)
            self._packed = found
        return self._packed

    def _segment_names(self) -> list[str]:
        return [name for name in self._segments.names() if _SEGMENT.match(name)]

    def _segment_writer(self, name: str) -> Fence | None:
        with suppress(NotFound, ValidationError):  # a damaged one has no writer
            return SegmentMeta.model_validate_json(self._segments.read(name, META_FILE)).fence
        return None

    def _pack_writer(self, name: str) -> Fence | None:
        with suppress(NotFound):  # written by a version without this file
            raw = self._vectors.read(name, WRITER_FILE)
            return None if raw == b"null" else Fence.model_validate_json(raw)
        return None

    def _packs(self) -> list[str]:
        return [name for name in self._vectors.names() if _PACK.match(name)]

    def _pack(self, name: str) -> dict[str, Any]:
        return unpack_arrays(self._vectors.read(name, VECTORS_FILE))

    def _damaged(self, segment_id: str, why: str) -> Misconfigured:
        return Misconfigured(f"journal segment {segment_id} in {self._named} is damaged: {why}; restore it from a copy")
