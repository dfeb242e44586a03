"""Manifests: what a released model is, and what it was trained on."""

from __future__ import annotations

from pydantic import Field

from schemas.base import EncoderVersion, Message, UtcTime
from schemas.versions import SchemaVersion

TopicOffsets = dict[str, dict[int, int]]
"""Topic (without prefix) -> partition -> next offset to read."""

RELEASE_ID = r"^r[0-9]{6}-[0-9a-f]{12}$"
"""Pattern of a release's name: its number, and the head of its weights' checksum."""


class Fence(Message):
    """Kafka's own proof of who may release: the transactional producer's id and epoch. A larger pair wins."""

    producer_id: int
    """Producer id that the broker gave to the trainer's transactional id."""
    epoch: int
    """Epoch of that producer id; each new holder gets a higher one."""

    def as_pair(self) -> tuple[int, int]:
        """Comparable form."""
        return (self.producer_id, self.epoch)


class ModelManifest(Message):
    """`manifest.json` of a release folder: enough to serve it, to explain it and to rebuild its training set."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    release_id: str = Field(pattern=RELEASE_ID)
    """Running number and the head of `weights_sha256`."""
    weights_sha256: str
    """Checksum of `model.safetensors`."""
    parent: str | None = None
    """The release before."""
    encoder_version: EncoderVersion
    """Vectors that this model may meet; no others."""
    dim: int
    """Width of those vectors."""
    created_at: UtcTime
    """Wall clock at release."""
    first_event_at: UtcTime | None = None
    """Event time of the first training row."""
    last_event_at: UtcTime | None = None
    """Event time of the last training row."""
    rows_trained: int = Field(ge=0)
    """Impressions learned from, since the first release."""
    steps: int = Field(ge=0)
    """Optimiser steps taken."""
    rows_sha256: str
    """Running hash over every training row (ids, label, negatives, order): equal hashes, equal training sets."""
    rows_tree_sha256: str | None = None
    """Root of a hash tree over the users' rows of this release alone; it still verifies after a user was erased."""
    segment: str | None = None
    """Journal of these rows, those learned since the candidate before; `mimstream trainset` rebuilds them from it."""
    offsets: TopicOffsets
    """`behaviours`: per partition, the offset after the last event learned from of which all before are done with;
    `embeddings`: the next offset to read."""
    cluster_id: str | None = None
    """The Kafka cluster that `offsets` belong to."""
    topic_ids: dict[str, str] = Field(default_factory=dict)
    """The topics' own ids: a topic that was deleted and created again has another one."""
    config: dict[str, object] = Field(default_factory=dict)
    """Configuration of model and trainer."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Prequential metrics at the time of release."""
    fence: Fence | None = None
    """Who released it."""


class PromotionDecision(Message):
    """`verdict.json` of a release folder: how the candidate compared with the release that answered then."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    passed: bool
    """Whether it may answer; a refused one is kept, and serving stays as it is."""
    reasons: list[str] = Field(default_factory=list)
    """Why it was refused; empty if it passed."""
    remarks: list[str] = Field(default_factory=list)
    """What could not be compared, and why."""
    against: str | None = None
    """The release that it was compared with; None if nothing answered then."""
    rows: int = 0
    """Rows that both scored before either had learned from them."""
    figures: dict[str, float | None] = Field(default_factory=dict)
    """What was compared: `ciubm_*` of the candidate, `serving_*` of the release that answered."""


class ReleaseNotice(Message):
    """A record of `models`: a release was made or chosen. Only a notice; the truth is the model store's pointer."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    release_id: str
    """The release."""
    weights_sha256: str
    """Checksum of its weights."""
    encoder_version: EncoderVersion
    """The vectors it goes with."""
    released_at: UtcTime
    """Wall clock at release."""
    passed: bool = True
    """Whether it may answer; a release that the promotion gate refused is announced too."""
    chosen_by: str | None = None
    """Who moved or pinned the pointer by hand, where it was not a trainer."""
