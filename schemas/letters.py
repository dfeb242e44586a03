"""Dead letters: the original bytes as value, everything else in headers.

A letter is not changed once it is written. That it was handled (`Handled`) is a record of its own under the same key,
and so in the same partition. The headers of a record that is sent again (`RequeueHeaders`) name its letter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter

from schemas.base import UtcTime
from schemas.errors import Reason

Headers = list[tuple[str, bytes]]
ForeignHeaders = Iterable[tuple[str, bytes | None]]
"""Headers of a record that any producer may have written: names can repeat, and values be missing or of any form."""

Action = Literal["requeued", "dropped"]
_ACTIONS: tuple[Action, ...] = ("requeued", "dropped")
_TIME: TypeAdapter[datetime] = TypeAdapter(UtcTime)
_LETTER_KEY = re.compile(rb"[A-Za-z0-9._-]{1,249}/[0-9]{1,18}/[0-9]{1,18}")


_REQUEUE_NAMES = ("requeued-from", "attempts", "first-failed-at")
_KEPT = "header:"
_KEPT_BYTES = 8_192


def kept_headers(headers: ForeignHeaders) -> tuple[tuple[str, bytes | None], ...]:
    """The headers that a record has by itself, which a letter keeps since a field map may read them.

    None at all where they are larger than 8 KiB together: a letter must fit its topic.
    """
    own = tuple((name, value) for name, value in headers if name not in _REQUEUE_NAMES)
    size = sum(len(name.encode(errors="backslashreplace")) + len(value or b"") + 32 for name, value in own)
    return own if size <= _KEPT_BYTES else ()


def _by_name(headers: ForeignHeaders) -> dict[str, bytes]:
    """The last header of each name; one without a value counts as absent."""
    return {name: value for name, value in dict(headers).items() if value is not None}


def _count(value: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", value):
        raise ValueError(f"not a count of at most 18 digits: {value[:40]!r}")
    return int(value)


def _moment(value: bytes) -> datetime:
    return _TIME.validate_python(datetime.fromisoformat(value.decode())).astimezone(UTC)


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
    """Which step failed: `decode`, `image`, `encode`, `write` or `record`."""
    reason: Reason
    detail: str
    failed_at: datetime
    attempts: int = 1
    first_failed_at: datetime | None = None
    """When it failed first, if it was sent again after that."""
    requeued_from: str | None = None
    """The letter (`letter_key`) that it was sent again from."""
    record_headers: tuple[tuple[str, bytes | None], ...] = ()
    """The record's own headers (`kept_headers`)."""

    @property
    def letter_key(self) -> bytes:
        """Key of the letter: its source coordinates, by which the same failure is recognised after a restart."""
        return f"{self.topic}/{self.partition}/{self.offset}".encode()

    @property
    def digest(self) -> str:
        """16 hex digits over key and value: differs for records of the same offset in two incarnations of a topic."""
        digest = hashlib.sha256()
        for part in (self.key, self.value):
            digest.update(b"-" if part is None else b"%d:" % len(part))
            digest.update(part or b"")
        return digest.hexdigest()[:16]

    def after(self, headers: ForeignHeaders) -> DeadLetter:
        """The letter with the headers of the record, and the earlier failures that they name."""
        headers = list(headers)
        letter, again = replace(self, record_headers=kept_headers(headers)), RequeueHeaders.from_headers(headers)
        if again is None:
            return letter
        return replace(
            letter,
            attempts=self.attempts + again.attempts,
            first_failed_at=again.first_failed_at,
            requeued_from=again.letter_key.decode(),
        )

    def headers(self) -> list[tuple[str, bytes | None]]:
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
        headers: list[tuple[str, bytes | None]] = [
            (name, value.encode(errors="backslashreplace")) for name, value in plain.items()
        ]
        if self.key is not None:
            headers.append(("key", self.key))
        if self.first_failed_at is not None:
            headers.append(("first-failed-at", self.first_failed_at.isoformat().encode()))
        if self.requeued_from is not None:
            headers.append(("requeued-from", self.requeued_from.encode()))
        return [*headers, *((_KEPT + name, value) for name, value in self.record_headers)]

    @classmethod
    def from_record(cls, value: bytes | None, headers: ForeignHeaders) -> DeadLetter:
        """Read a letter back; `ValueError` or `KeyError` if the headers are not those of a letter."""
        headers = list(headers)
        found = _by_name(headers)
        first, origin = found.get("first-failed-at"), found.get("requeued-from")
        return cls(
            topic=found["topic"].decode(),
            partition=_count(found["partition"]),
            offset=_count(found["offset"]),
            key=found.get("key"),
            value=value,
            stage=found["stage"].decode(),
            reason=Reason(found["reason"].decode()),
            detail=found["detail"].decode(),
            failed_at=_moment(found["failed-at"]),
            attempts=_count(found["attempts"]),
            first_failed_at=_moment(first) if first else None,
            requeued_from=origin.decode() if origin else None,
            record_headers=tuple((name[len(_KEPT) :], value) for name, value in headers if name.startswith(_KEPT)),
        )


@dataclass(frozen=True, slots=True)
class RequeueHeaders:
    """The headers of a record that was sent again from a dead letter."""

    letter_key: bytes
    attempts: int
    """How often it has failed."""
    first_failed_at: datetime

    @classmethod
    def of(cls, letter: DeadLetter) -> RequeueHeaders:
        """The headers of this letter's record when it is sent again."""
        return cls(letter.letter_key, letter.attempts, letter.first_failed_at or letter.failed_at)

    def headers(self) -> Headers:
        """As Kafka headers."""
        return [
            ("requeued-from", self.letter_key),
            ("attempts", str(self.attempts).encode()),
            ("first-failed-at", self.first_failed_at.isoformat().encode()),
        ]

    @classmethod
    def from_headers(cls, headers: ForeignHeaders) -> RequeueHeaders | None:
        """Read back; None if the record was not sent again, or has other headers of these names."""
        found = _by_name(headers)
        if not _LETTER_KEY.fullmatch(found.get("requeued-from", b"")):
            return None
        try:
            return cls(found["requeued-from"], _count(found["attempts"]), _moment(found["first-failed-at"]))
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Handled:
    """That a letter was handled: a record under the letter's key, without a value."""

    letter_key: bytes
    digest: str
    action: Action
    at: datetime

    def headers(self) -> Headers:
        """Everything, as Kafka headers."""
        return [
            ("handled", self.action.encode()),
            ("digest", self.digest.encode()),
            ("handled-at", self.at.isoformat().encode()),
        ]

    @classmethod
    def from_record(cls, key: bytes | None, headers: ForeignHeaders) -> Handled | None:
        """Read back; None if the record is a letter. `ValueError` or `KeyError` if it is neither."""
        found = _by_name(headers)
        if "handled" not in found or key is None:
            return None
        word = found["handled"].decode()
        action = next((known for known in _ACTIONS if known == word), None)
        if action is None:
            raise ValueError(f"a dead letter can be requeued or dropped, not {word!r}")
        return cls(key, found["digest"].decode(), action, _moment(found["handled-at"]))
