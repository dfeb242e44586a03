"""Configuration of the online trainer; free of torch, so that reading settings stays quick."""

from __future__ import annotations

from pydantic import Field

from trainer.features.config import FeatureConfig
from trainer.networks.config import CiUBMConfig, LearnerConfig
from trainer.samples.config import JoinConfig


class TrainerConfig(JoinConfig):
    """The sliding window, the negatives and the cadence of releases."""

    seed: int = 20250201
    """Seed of every random choice."""
    batch_rows: int = Field(default=256, ge=2)
    """Impressions per optimiser step."""
    window_seconds: float = Field(default=6 * 3600.0, gt=0)
    """Length of the sliding window that space negatives come from, in event time."""
    window_takes: int = Field(default=1024, ge=1)
    """Most takes in that window."""
    bank_takes: int = Field(default=8192, ge=1)
    """Most takes in the bank that time negatives come from."""
    bank_seconds: float = Field(default=14 * 24 * 3600.0, gt=0)
    """Oldest take in the bank, in event time."""
    space_negatives: int = Field(default=128, ge=0)
    """Items drawn from the window for each step."""
    time_negatives: int = Field(default=128, ge=0)
    """Items drawn from the bank for each step."""
    popularity_half_life_seconds: float = Field(default=3 * 24 * 3600.0, gt=0)
    """Half-life of the take counts behind the logQ correction."""
    remembered_items: int = Field(default=500_000, ge=1)
    """Deleted items, and as many whose vector was given up, that rows do not wait for; about 150 bytes each."""
    item_megabytes: float = Field(default=2048.0, gt=0)
    """Memory for items that behaviours named, by estimate: 720 bytes each and 4 per component of their vectors. Above
    it, or above twice what is in use, those that no history, no row and no draw names lose their number and, once
    deleted, everything else; named again they are numbered anew. The topic `embeddings` bounds the vectors of items
    that are not deleted."""
    release_every_rows: int = Field(default=20_000, ge=1)
    """Rows learned between two releases."""
    release_every_event_seconds: float | None = Field(default=None, gt=0)
    """Event time between two releases, where that comes before `release_every_rows`."""
    pending_megabytes: float = Field(default=4096.0, gt=0)
    """Memory for events on their way to rows, by estimate (1,700 bytes an event, then 600 and 16 per take of its
    history). Above it only the partitions are read that event time waits for. Each event waits for LATENESS_SECONDS and
    ATTRIBUTION_SECONDS, so the defaults carry 20,000 events a second of event time. If that wait alone does not fit
    into twice as much, the trainer ends and says so."""
    features: FeatureConfig = Field(default_factory=FeatureConfig)
    """The features of the moment."""
    model: CiUBMConfig = Field(default_factory=CiUBMConfig)
    """The network."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Optimisers and losses."""

    @property
    def learns_kinds(self) -> bool:
        """Whether it matters as what a row was taken, and what that was worth."""
        return bool(self.model.kinds or self.learner.value_weight)
