"""Settings that training rows depend on, whatever network is trained on them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class JoinConfig(BaseModel):
    """How a click log becomes impressions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    history_length: int = Field(default=50, ge=1, le=1_000)
    """Most recent takes of a user that a row sees."""
    max_users: int = Field(default=1_000_000, ge=1)
    """Users whose history is kept; the one inactive for longest is removed first."""
    lateness_seconds: float = Field(default=60.0, ge=0)
    """How far an event may lie behind its partition's newest one and still count."""
    duplicate_horizon_seconds: float = Field(default=6 * 3600.0, ge=0)
    """How long an event_id is remembered, in event time."""
    attribution_seconds: float = Field(default=60.0, ge=0)
    """How long an impression waits for its take, in event time, before it counts as not taken."""
    correction_seconds: float = Field(default=3600.0, ge=0)
    """How long after that a late take still corrects it: the impression is trained on once more, as taken."""
    correction_rows: int = Field(default=10_000, ge=0)
    """The newest impressions trained on as not taken that a late take can correct; 0 switches corrections off."""
