"""Settings and reports of the item path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from schemas.field_maps import FieldMap, checked_field_map
from schemas.items import ItemPublished
from streams.broker.records import SourceRecord
from streams.indexing.slots import LeaseConfig
from streams.runtime.delivery import BackOffConfig


class IndexConfig(BaseModel):
    """How items are indexed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_max_items: int = Field(default=64, ge=1, le=4_096)
    """Most records that are encoded and written together."""
    batch_within_seconds: float = Field(default=0.2, gt=0)
    """Longest wait for a batch to fill up."""
    batches_ahead: int = Field(default=2, ge=0, le=16)
    """Batches whose pictures are fetched, decoded and encoded while an earlier one is written. 0: one after another.

    Memory is bounded whatever the speed of the topic: a worker holds at most `batches_ahead` + 2 batches and three
    more in Faust's buffers, so (`batches_ahead` + 5) times `batch_max_items` records and their decoded pictures, and
    one fetch of each of its partitions. Pictures behind URLs are held within `MIM_IMAGES__MAX_HELD_BYTES`.
    """
    cache_items: int = Field(default=10_000, ge=0)
    """Vectors kept by content, so that what was encoded a moment ago is not encoded again; 4 bytes a dimension each."""
    prepare_threads: int = Field(default=2, ge=1, le=64)
    """Threads that decode pictures and tokenise titles."""
    encode_threads: int | None = Field(default=None, ge=1, le=256)
    """Passes through the towers that run side by side. By default one per core that torch may use
    (`MIM_ENCODER__NUM_THREADS`) on a CPU, each then on one core, and one on any other device."""
    field_map: Annotated[FieldMap, AfterValidator(partial(checked_field_map, model=ItemPublished))] = Field(
        default_factory=dict
    )
    """Where a platform's records of items hold our fields: `{"item_id": "sku", "image_url": "pics.0.href"}`. See
    deploy/field-maps.md."""
    outcomes: tuple[str, ...] = ()
    """Attributes of items that are left out, because they tell what became of an item (ratings, sales). A click model
    that learns from them knows what nobody knew when the item was shown. A name that looks like one is reported.
    Items that were indexed before keep theirs until `mimstream center verify --repair`, or their next publish."""
    max_ahead_seconds: float = Field(default=3_600.0, ge=0)
    """How far in the future a time in an event may lie."""
    fetch_budget_seconds: float = Field(default=1.0, gt=0)
    """How long a request for a picture may take; what has not come by then is retried beside the stream. Waiting for a
    turn (`MIM_IMAGES__CONCURRENCY`) is not counted: it holds the stream back."""
    retry_initial_seconds: float = Field(default=10.0, gt=0)
    """Wait before the first retry of a picture."""
    retry_factor: float = Field(default=3.0, ge=1)
    """Each further wait is this many times the one before."""
    retry_max_seconds: float = Field(default=3_600.0, gt=0)
    """Longest wait between two retries."""
    retry_max_attempts: int = Field(default=8, ge=1)
    """Failed fetches after which a picture is given up. Eight take two hours."""
    retry_max_waiting: int = Field(default=1_000, ge=1)
    """Retries that one worker holds in memory; reading of `items-retry` pauses above it."""
    queries: bool = True
    """Read `behaviours` too, and encode what users searched for into `queries`: a trainer with
    `MIM_TRAINER__FEATURES__QUERIES` waits for these vectors. Where no trainer has that setting, false spares workers
    the click log: they then read `items` and `items-retry` alone."""
    remembered_queries: int = Field(default=100_000, ge=1)
    """Announced queries that a worker remembers, so that what is searched again is not encoded again. One that is
    forgotten is encoded once more."""
    back_off: BackOffConfig = Field(default_factory=BackOffConfig)
    """Waits while Milvus or Kafka is away."""
    lease: LeaseConfig = Field(default_factory=LeaseConfig)
    """How a worker holds its slot."""
    session_timeout_seconds: float = Field(default=30.0, ge=6)
    """After this long without a sign of life a worker's partitions move to others. One that is back sooner goes on."""
    topic_check_seconds: float = Field(default=30.0, ge=0.1)
    """How long partitions that are added to a topic may go unnoticed."""
    commit_interval_seconds: float = Field(default=1.0, gt=0)
    """How often acknowledged positions are committed."""
    drain_seconds: float = Field(default=20.0, gt=0)
    """How long a worker that is told to stop may finish what it has in hand."""

    @property
    def write_deadline_seconds(self) -> float:
        """How long one write to Milvus may take. Together with the time since the last heartbeat it stays below the
        session's: no other worker can have the partition before the write is over.
        """
        return 0.4 * self.session_timeout_seconds

    @property
    def read_ahead_seconds(self) -> float:
        """How long before a write its rows may have been read; they are read again after that."""
        return self.silence_seconds

    @property
    def recheck_seconds(self) -> float:
        """How long after a write another worker's write may arrive that was decided without it: that worker may have
        read rows long before, and then deletes and writes.
        """
        return self.read_ahead_seconds + 2 * self.write_deadline_seconds

    @property
    def silence_seconds(self) -> float:
        """How long after the last confirmed heartbeat a write may begin."""
        return self.session_timeout_seconds - self.write_deadline_seconds

    @property
    def held_records(self) -> int:
        """Most records that a worker holds, whatever the speed of the topic."""
        return (self.batches_ahead + 5) * self.batch_max_items

    def retry_wait_seconds(self, failed: int) -> float:
        """Wait after `failed` fetches (from 1)."""
        return min(self.retry_max_seconds, self.retry_initial_seconds * self.retry_factor ** min(failed - 1, 64))


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Outcome of a batch of `items`."""

    events: int
    superseded: int
    """A later event of the same item was in the same batch."""
    encoded: int
    """Rows with a new vector."""
    rewritten: int
    """Rows whose content had not changed."""
    pending: int
    """Rows without vector: their only content is a picture that is still to come."""
    deleted: int
    stale: int
    """The center already holds something newer."""
    image_retries: int
    """Pictures that will be fetched again later."""
    dead_lettered: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By (stage, reason)."""
    held_seconds: float = 0.0
    """Time spent waiting for stores that were away."""
    seconds: float = 0.0
    written: Sequence[SourceRecord] = field(default=(), repr=False)
    """The records whose rows or marks were written, each with the time that its row has."""


@dataclass(frozen=True, slots=True)
class RetryReport:
    """Outcome of one late picture."""

    outcome: str
    """`written`, `again`, `superseded` or `given_up`."""
    attempt: int
    dead_lettered: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QueryReport:
    """What became of the searches in a batch of `behaviours`."""

    known: int
    """Searches whose query is announced already, or met twice in the batch."""
    encoded: int = 0
    refused: int = 0
    """Queries that cannot be encoded."""


@dataclass(frozen=True, slots=True)
class PartitioningReport:
    """How many records of a batch lie where murmur2 of their key puts them, and how many in another partition."""

    home: int
    foreign: int
