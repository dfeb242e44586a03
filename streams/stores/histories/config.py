"""Settings of the store of user histories."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BehaviourStoreConfig(BaseModel):
    """What is kept of each user."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    history_length: int = Field(default=100, ge=1, le=10_000)
    """Items kept per user, those taken last; each stands once, at its newest take."""
    remembered_event_ids: int = Field(default=200, ge=1, le=10_000)
    """How many of a user's last events a second delivery is recognised among; 8 bytes each."""
    idle_days: int = Field(default=180, ge=1)
    """A user without an event for so long (wall clock) is forgotten, which bounds the number of users."""
