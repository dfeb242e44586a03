"""Manifests: a released model, and what it was trained on."""

from __future__ import annotations

from pydantic import Field

from schemas.base import EncoderVersion, Message, UtcTime
from schemas.versions import SchemaVersion

TopicOffsets = dict[str, dict[int, int]]
"""Topic (without prefix) -> partition -> next offset to read."""

NUMBERED = r"(?:[0-9]{6}|[1-9][0-9]{6,17})-[0-9a-f]{12}"
"""Pattern of a running number, of six digits or as many as it needs, and the head of a checksum."""
RELEASE_ID = rf"^r{NUMBERED}$"
"""Pattern of a release's name: its number, and the head of its weights' checksum."""


def running_number(name: str) -> int:
    """The number in the name of a release, a snapshot or a pack: 7 of `r000007-3f2a...`."""
    return int(name[1:].partition("-")[0])


class Fence(Message):
    """Proof of leadership of a trainer: the term that it claimed, and its transactional producer. A larger term wins.

    Producer ids are no order over time: brokers get them in blocks, so a newer producer can have a smaller id.
    """

    producer_id: int
    """Producer id that the broker gave to the trainer's transactional id."""
    epoch: int
    """Epoch of that producer id; each new holder gets a higher one."""
    term: int = Field(default=0, ge=0)
    """Running number of the claim in the store of snapshots; 0 in what versions without terms wrote."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Comparable form; producers are compared only where terms are equal, as versions without terms did."""
        return (self.term, self.producer_id, self.epoch)


class ModelManifest(Message):
    """`manifest.json` of a release: enough to serve it, to explain it and to rebuild its training set."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    release_id: str = Field(pattern=RELEASE_ID)
    """Running number and the head of `weights_sha256`."""
    weights_sha256: str
    """Checksum of `model.safetensors`."""
    parent: str | None = None
    """The release before."""
    encoder_version: EncoderVersion
    """Encoder version of the only vectors that this model scores."""
    dim: int
    """Width of those vectors."""
    features: str | None = None
    """Version of the features that it reads: a server that computes others refuses it. None in releases of builds whose
    servers computed none."""
    feature_probe: list[float] | None = None
    """Features of rows that are always the same, as the trainer computed them: a server that computes others refuses
    the release. None in releases of earlier builds."""
    created_at: UtcTime
    """Wall clock at release."""
    first_event_at: UtcTime | None = None
    """Event time of the first training row."""
    last_event_at: UtcTime | None = None
    """Event time of the last training row."""
    rows_trained: int = Field(ge=0)
    """Impressions trained on, since the first release."""
    steps: int = Field(ge=0)
    """Optimiser steps taken."""
    rows_sha256: str
    """Running hash over every training row (ids, label, negatives, order): equal hashes, equal training sets."""
    rows_tree_sha256: str | None = None
    """Root of a hash tree over the users' rows of this release alone; it still verifies after a user was erased."""
    segment: str | None = None
    """Journal segment of the rows since the previous candidate; `mimstream trainset` rebuilds them from it."""
    offsets: TopicOffsets
    """`behaviours`: per partition, the offset below which all events are done with; `embeddings`: the next offset to
    read."""
    cluster_id: str | None = None
    """The Kafka cluster that `offsets` belong to."""
    topic_ids: dict[str, str] = Field(default_factory=dict)
    """Kafka's topic ids: a topic that was deleted and created again has another one."""
    config: dict[str, object] = Field(default_factory=dict)
    """Configuration of model and trainer."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Prequential metrics at the time of release."""
    fence: Fence | None = None
    """Fence of the trainer that released it."""


class PromotionDecision(Message):
    """`verdict.json` of a release: how the candidate compared with the release that was current then."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    passed: bool
    """Whether it may become current; a refused one is kept, and the serving model stays."""
    reasons: list[str] = Field(default_factory=list)
    """Why it was refused; empty if it passed."""
    remarks: list[str] = Field(default_factory=list)
    """What could not be compared, and why."""
    against: str | None = None
    """The release that it was compared with; None if there was no current one."""
    best: str | None = None
    """An earlier release that ordered these rows better: the next candidate is compared with it, too. None if this
    release is the best so far."""
    rows: int = 0
    """Rows that all of them scored before any was trained on them."""
    figures: dict[str, float | None] = Field(default_factory=dict)
    """What was compared: `ciubm_*` of the candidate, `serving_*` of the current release, `best_*` of `best`."""


class ReleaseNotice(Message):
    """A record of `models`: a release was made or chosen. Only a notice; the registry's pointer decides."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    release_id: str
    """The release."""
    weights_sha256: str
    """Checksum of its weights."""
    encoder_version: EncoderVersion
    """Encoder version of the vectors that it scores."""
    released_at: UtcTime
    """Wall clock at release."""
    passed: bool = True
    """Whether it may become current; a release that the promotion gate refused is announced too."""
    chosen_by: str | None = None
    """The user who moved or pinned the pointer; None for a trainer."""
