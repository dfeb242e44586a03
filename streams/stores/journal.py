"""The journal of training, a segment per candidate, and the vectors that its rows were learned with.

```text
journal/s000020000-3f2a.../segment.safetensors    places of rows in the log, negatives, which vector from when on
                           values.json
                           segment.json           whose it is: log, encoder, rules of the join, hashes
vectors/v000001-9b1c.../vectors.safetensors       content and vector digests with their vectors, each kept once
```

Segments and vectors are there before the release that they belong to, and go when it goes. The topic `embeddings` keeps
only the newest vector of an item; what older rows saw is here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import Field, ValidationError

from schemas.base import EncoderVersion, Message
from schemas.errors import Misconfigured
from streams.stores.shelf import NotThere, Shelf
from streams.stores.snapshots import pack_arrays, unpack_arrays

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trainer.journal import Segment

log = structlog.get_logger()

SEGMENT_FILE = "segment.safetensors"
VALUES_FILE = "values.json"
META_FILE = "segment.json"
VECTORS_FILE = "vectors.safetensors"
_SEGMENT = re.compile(r"^s[0-9]{9,12}-[0-9a-f]{12}$")
_PACK = re.compile(r"^v[0-9]{6}-[0-9a-f]{12}$")


class SegmentMeta(Message):
    """`segment.json`: what it takes to read the log again as it was read."""

    segment_id: str
    """First row and the head of `root`."""
    root: str
    """Hash over rows, negatives and vectors."""
    rows: int
    """How many rows."""
    sha256: str = ""
    """Checksum of the other two files together."""
    encoder_version: EncoderVersion
    """The vectors it was learned with."""
    dim: int
    """Width of those vectors."""
    cluster_id: str | None
    """The Kafka cluster of the log."""
    topic_ids: dict[str, str]
    """The topics' own ids."""
    begins: dict[int, int]
    """Per partition of `behaviours`, where training began to read."""
    ends: dict[int, int]
    """Per partition, the next offset that was to be read when the segment ended."""
    overtaken: list[tuple[int, int]] = Field(default_factory=list)
    """Partition and offset of events that were late because the other partitions had gone on."""
    rules: dict[str, float]
    """Settings of the trainer that the join depends on."""
    packs: list[str] = Field(default_factory=list)
    """Where its vectors are."""


@dataclass(frozen=True, slots=True)
class KeptSegment:
    """A segment, read and checked; its archive is read on demand."""

    meta: SegmentMeta
    segment: Segment


class JournalStore:
    """Segments on one shelf, vectors on another. All calls block. `named` is how messages call the place."""

    def __init__(self, segments: Shelf, vectors: Shelf, *, named: str) -> None:
        self._segments = segments
        self._vectors = vectors
        self._named = named
        self._packed: dict[bytes, str] | None = None

    def write(self, segment: Segment, meta: SegmentMeta) -> None:
        """Keep a segment and those of its vectors that are not kept yet. Raises `StoreUnavailable`."""
        packs = self._archive(segment.archive)
        state = segment.to_state()
        packed, values = pack_arrays(state.arrays), json.dumps(state.values).encode()
        meta = meta.model_copy(update={"packs": packs, "sha256": hashlib.sha256(packed + values).hexdigest()})
        files = {SEGMENT_FILE: packed, VALUES_FILE: values, META_FILE: meta.model_dump_json(indent=2).encode()}
        self._segments.put(meta.segment_id, files)

    def load(self, segment_id: str) -> KeptSegment:
        """Read a segment. Raises `NotThere`, and `Misconfigured` if it is damaged."""
        from trainer.journal import Segment
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
        """The vectors of a segment's packs by their digest; a pack that is not there is passed over."""
        found: dict[bytes, NDArray[np.float32]] = {}
        for name in meta.packs:
            with suppress(NotThere):
                arrays = self._pack(name)
                found |= {d.tobytes(): vector for d, vector in zip(arrays["digests"], arrays["vectors"], strict=True)}
        return found

    def retain(self, segment_ids: Collection[str]) -> None:
        """Forget all other segments, and vectors that none of these needs."""
        names = [name for name in self._segments.names() if _SEGMENT.match(name)]
        for name in names:
            if name not in segment_ids:
                self._segments.drop(name)
        needed: set[str] = set()
        for name in set(names) & set(segment_ids):
            with suppress(NotThere):
                needed.update(json.loads(self._segments.read(name, META_FILE))["packs"])
        for name in self._packs():
            if name not in needed:
                self._vectors.drop(name)
                self._packed = None
                log.info("journal.vectors_forgotten", pack=name)
        self._segments.sweep(600.0)
        self._vectors.sweep(600.0)

    def _archive(self, archive: Mapping[bytes, NDArray[np.float32]]) -> list[str]:
        import numpy as np

        packed = self._index()
        fresh = sorted(digest for digest in archive if digest not in packed)
        if fresh:
            digests = np.frombuffer(b"".join(fresh), np.uint8).reshape(len(fresh), -1)
            content = pack_arrays({"digests": digests, "vectors": np.stack([archive[digest] for digest in fresh])})
            number = 1 + max((int(name[1:7]) for name in self._packs()), default=0)
            name = f"v{number:06d}-{hashlib.sha256(content).hexdigest()[:12]}"
            self._vectors.put(name, {VECTORS_FILE: content})
            packed |= dict.fromkeys(fresh, name)
        return sorted({packed[digest] for digest in archive})

    def _index(self) -> dict[bytes, str]:
        if self._packed is None:
            found: dict[bytes, str] = {}
            for name in self._packs():
                found |= {digest.tobytes(): name for digest in self._pack(name)["digests"]}
            self._packed = found
        return self._packed

    def _packs(self) -> list[str]:
        return [name for name in self._vectors.names() if _PACK.match(name)]

    def _pack(self, name: str) -> dict[str, Any]:
        return unpack_arrays(self._vectors.read(name, VECTORS_FILE))

    def _damaged(self, segment_id: str, why: str) -> Misconfigured:
        return Misconfigured(f"journal segment {segment_id} in {self._named} is damaged: {why}; restore it from a copy")
