"""Dead letters: the original bytes as value, everything else in headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from schemas.errors import Reason

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be processed, with what is needed to understand and to replay it.

    Headers rather than an envelope: a record that just fits its topic would not fit another once wrapped in JSON.
    """

    topic: str
    """Topic that the record came from, without prefix."""
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    """The original bytes, untouched."""
    stage: str
    """Which step gave up: `decode`, `image`, `encode`, `write` or `record`."""
    reason: Reason
    detail: str
    failed_at: datetime
    attempts: int = 1

    @property
    def letter_key(self) -> bytes:
        """Key of the letter: its source coordinates, by which the same failure is recognised after a restart."""
        return f"{self.topic}/{self.partition}/{self.offset}".encode()

    def headers(self) -> Headers:
        """Everything but the value, as Kafka headers."""
        plain = {
            "topic": self.topic,
            "partition": str(self.partition),
            "offset": str(self.offset),
            "stage": self.stage,
            "reason": self.reason.value,
            "detail": self.detail[:1_000],
            "failed-at": self.failed_at.isoformat(),
            "attempts": str(self.attempts),
        }
        headers = [(name, value.encode()) for name, value in plain.items()]
        if self.key is not None:
            headers.append(("key", self.key))
        return headers

    @classmethod
    def from_record(cls, value: bytes | None, headers: Iterable[tuple[str, bytes]]) -> DeadLetter:
        """Read a letter back; `ValueError` or `KeyError` if the headers are not those of a letter."""
        found = dict(headers)
        return cls(
            topic=found["topic"].decode(),
            partition=int(found["partition"]),
            offset=int(found["offset"]),
            key=found.get("key"),
            value=value,
            stage=found["stage"].decode(),
            reason=Reason(found["reason"].decode()),
            detail=found["detail"].decode(),
            failed_at=datetime.fromisoformat(found["failed-at"].decode()),
            attempts=int(found["attempts"]),
        )
