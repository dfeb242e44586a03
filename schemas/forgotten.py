"""A user who asked to be forgotten."""

from __future__ import annotations

from pydantic import Field

from schemas.base import Message, UserId, UtcTime
from schemas.versions import SchemaVersion


class ForgottenUser(Message):
    """A record of `forgotten`, keyed by the user's id: erases the user's records in the click log at that time.

    The limit is given as offsets, not as a time, since event times come from the clocks of apps. Records of this user
    from `ends` on belong to a new user with the same id. A topic `behaviours` with another id than `topic_id` is newer
    than the request, and nothing of it is erased.
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
