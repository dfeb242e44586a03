"""Configuration of `mimstream train`; free of torch, so that reading settings stays quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from schemas.base import EncoderVersion
from streams.stores.artifacts.config import NEW_STORE

ANEW = f"{NEW_STORE} and an empty MIM_TRAIN__SNAPSHOT_FOLDER"
"""How messages ask for all that a trainer has to do without, where what it learned belongs to something else."""


class TrainConsumerConfig(BaseModel):
    """How `mimstream train` reads, waits and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    variants: str = "ciubm"
    """What is trained side by side, comma-separated: `ciubm`, and for comparison `din` and `ciubm_shuffled`."""
    encoder_version: EncoderVersion | None = None
    """Encoder whose vectors are used; by default that of the first record of `embeddings`. Others are ignored."""
    hold_seconds: float = Field(default=120.0, ge=0)
    """How long after it was produced a behaviour may hold the stream to wait for the vector of its item, or of
    what was searched."""
    idle_seconds: float = Field(default=5.0, gt=0)
    """A partition that is read to its end and silent for this long does not hold the watermark any more."""
    all_idle_seconds: float = Field(default=60.0, gt=0)
    """The last partition to fall silent does so only after this long: while nothing is read at all, an event that is
    under way still has so long to arrive. No less than MIM_TRAIN__IDLE_SECONDS counts."""
    open_transaction_seconds: float = Field(default=900.0, ge=0)
    """How long a producer's open transaction holds the watermark; 900 seconds is the longest that Kafka allows one by
    default. Producers without transactions are not affected."""
    fetch_max_records: int = Field(default=5_000, ge=1)
    """Records taken from the broker's answers at a time, over all partitions."""
    buffered_records: int = Field(default=50_000, ge=1)
    """Behaviours that were fetched and wait for their turn, over all partitions; above it fetching pauses."""
    commit_interval_seconds: float = Field(default=2.0, gt=0)
    """How often the group is told how far training has got."""
    states_every_takes: int = Field(default=200, ge=1)
    """Takes after which the states of items that changed are written for servers, at most once a second; what servers
    lag in takes is what costs."""
    states_every_seconds: float = Field(default=10.0, gt=0)
    """How long changed states wait at most where fewer takes come."""
    states_per_write: int = Field(default=4_096, ge=1)
    """Items of one write, of about 700 bytes each; the rest follows a second later. A take changes its item and those
    of its user's history, so more can change than is written: servers then lag, and `train.states_left` says so."""
    skew_every_seconds: float = Field(default=30.0, gt=0)
    """How often features that servers computed are compared with the trainer's own, those of one state each time."""
    skew_limit: float = Field(default=0.01, ge=0, le=1)
    """Share of the compared rows that may differ, by more than a thousandth in any feature; above it `train.skew` is
    logged as an error, and `mimstream skew` ends with status 1."""
    session_timeout_ms: int = Field(default=10_000, ge=1_000)
    """How long a killed trainer keeps its role."""
    state_folder: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "mimstream" / "train")
    """Where `accounts.json` and the newest prequential scores (`scores/*.parquet`) are written. One trainer each. With
    the embedded stack (--stack, or MIM_KAFKA__BOOTSTRAP_SERVERS not set): `train` in the stack's folder."""
    report_interval_seconds: float = Field(default=1.0, gt=0)
    """How often `accounts.json` is written."""
    score_files: int = Field(default=200, ge=1)
    """How many files of prequential scores are kept, 50,000 rows each."""
    release_every_seconds: float | None = Field(default=None, gt=0)
    """Wall time between two releases, where that comes before MIM_TRAINER__RELEASE_EVERY_ROWS and
    MIM_TRAINER__RELEASE_EVERY_EVENT_SECONDS; which rows a release ends with then depends on when they were read."""
    snapshot_folder: Path | None = None
    """Where snapshots, journal and archived vectors are kept, for all candidates of this trainer's role; by default
    `training` in MIM_MODELS__FOLDER. A snapshot writes what changed since the one before it and
    what waits in memory: at most 8 MB with the default model, 4 bytes per number of each changed item's vector, 1 kB
    per changed user with a full history. All together take about twice what one with everything would."""
    snapshot_every_events: int = Field(default=100_000, ge=1)
    """Events read between two snapshots; another one is taken before each release and at a clean stop."""
    keep_snapshots: int = Field(default=3, ge=1)
    """How many of the newest snapshots are kept."""
