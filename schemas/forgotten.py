"""A user who asked to be forgotten."""

from __future__ import annotations

from pydantic import Field

from schemas.base import Message, UserId, UtcTime
from schemas.versions import SchemaVersion


class ForgottenUser(Message):
    """A record of `forgotten`, under the user's id: what the click log held of him then is nobody's any more.

    What is erased is told by offsets, not by time: clocks of apps differ, and event times are what an app says. Records
    of this user from `ends` on are those of a new user who happens to have the same id. Where the topic `behaviours` is
    another one than that of `topic_id`, all of it came later.
    """

    schema_version: SchemaVersion = 1
    """Version of this schema."""
    user_id: UserId
    """The user."""
    forgotten_at: UtcTime
    """Wall clock of the request."""
    cluster_id: str
    """The Kafka cluster that `ends` belong to."""
    topic_id: str
    """The id of its topic `behaviours`."""
    ends: dict[int, int] = Field(default_factory=dict)
    """Per partition of `behaviours`, the offset where it ended when the user asked."""
