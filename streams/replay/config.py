"""Settings of `mimstream replay`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ReplayConfig(BaseModel):
    """How far a replay may run ahead of its readers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_items_in_flight: int = Field(default=512, ge=1)
    """Items sent and not yet committed by the followed groups, above which the replay pauses."""
    max_behaviours_in_flight: int = Field(default=20_000, ge=1)
    """Behaviours sent and not yet committed by the followed groups, above which the replay pauses."""
    poll_seconds: float = Field(default=0.2, gt=0)
    """How often the groups' positions are read."""
