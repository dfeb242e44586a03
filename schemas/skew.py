"""Rows that servers scored, and what a trainer says of their features: topic `skew`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat, model_validator

from schemas.base import Base64, ItemId, Message, UtcTime
from schemas.item_states import MOST_WRITES, FeatureVersion
from schemas.queries import QueryId
from schemas.versions import SchemaVersion

Second = Annotated[int, Field(ge=-(1 << 61), le=1 << 61)]
"""Since 1970; any two can be subtracted in 64 bits."""
_MOST_ROWS = 1 << 53


class ServedRows(Message):
    """Rows of one request, as they went into the network. It does not say whose request it was."""

    release_id: str = Field(max_length=200)
    """The release that scored them."""
    number: int = Field(ge=1, le=MOST_WRITES)
    """Version of the state that the server had: `StateHead.number`."""
    before: int
    """Takes of earlier seconds are counted in it."""
    now: Second
    """When the request was made."""
    targets: list[ItemId] = Field(min_length=1, max_length=100)
    """One item a row."""
    history: list[ItemId] = Field(default_factory=list, max_length=1_000)
    """What the user took, oldest first, a trigger item last."""
    history_seconds: list[Second] = Field(default_factory=list)
    """When, a number each."""
    query: QueryId | None = None
    """What was searched, if the release reads it."""
    values: Base64
    """The features, little-endian float32, row by row in the order of their names."""
    probabilities: list[float | None]
    """What was answered, a number per row."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> ServedRows:
        if len(self.history) != len(self.history_seconds) or len(self.targets) != len(self.probabilities):
            raise ValueError("lists of one row each have different lengths")
        return self


class SkewOutcome(Message):
    """What a trainer found when it computed the features of such rows from its own state of that version."""

    number: int = Field(ge=1, le=MOST_WRITES)
    """Version of the state."""
    releases: list[str]
    """The releases that scored the rows."""
    rows: int = Field(ge=0, le=_MOST_ROWS)
    """Rows that were compared."""
    differing: int = Field(ge=0, le=_MOST_ROWS)
    """Rows of which a feature differs by more than `tolerance`."""
    tolerance: FiniteFloat = Field(ge=0)
    largest: dict[str, FiniteFloat]
    """Largest difference of each feature that differs."""
    compared_at: UtcTime


class SkewRecord(Message):
    """A record of the topic `skew`: rows that a server logged, or a trainer's outcome for rows of one state."""

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    features: FeatureVersion
    """The feature set that the rows are of."""
    served: ServedRows | None = None
    outcome: SkewOutcome | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> SkewRecord:
        if (self.served is None) == (self.outcome is None):
            raise ValueError("a record holds either rows or an outcome")
        return self
