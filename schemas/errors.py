"""The errors of the whole system, by whether a retry helps.

PipelineError
├── Unprocessable    no retry helps: the record goes to the dead letters
│   ├── BadMessage       the bytes do not match the schema
│   ├── EncodingFailed   the content cannot be encoded
│   └── WriteRejected    a store rejects the row
├── Unavailable      a service is down: pause the partition and retry
│   └── StoreUnavailable (StoreBusy), BrokerUnavailable, ContentUnavailable, EncoderUnavailable
├── Misconfigured    found at start-up: names the setting and the fix
└── Fenced           another process has this role: stop without writing
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a record is unprocessable. Stable: dashboards and dead-letter headers use these values."""

    NOT_JSON = "not_json"
    WRONG_TYPE = "wrong_type"
    UNKNOWN_VERSION = "unknown_version"
    NO_CONTENT = "no_content"
    NO_KEY = "no_key"
    KEY_MISMATCH = "key_mismatch"
    TOO_LARGE = "too_large"
    TIMESTAMP_WITHOUT_ZONE = "timestamp_without_zone"
    TIMESTAMP_IN_FUTURE = "timestamp_in_future"
    TIMESTAMP_TOO_EARLY = "timestamp_too_early"
    RECORD_TIMESTAMP = "record_timestamp"
    BAD_IMAGE = "bad_image"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_REFUSED = "image_refused"
    IMAGE_UNAVAILABLE = "image_unavailable"
    ENCODER_FAILED = "encoder_failed"
    BAD_VECTOR = "bad_vector"
    WRITE_REJECTED = "write_rejected"


class PipelineError(Exception):
    """Root of every error raised on purpose."""


class Unprocessable(PipelineError):
    """A retry cannot help; the record goes to the dead letters with `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BadMessage(Unprocessable):
    """The bytes of a record do not match its topic's schema."""


class EncodingFailed(Unprocessable):
    """The content of one item cannot be encoded."""


class WriteRejected(Unprocessable):
    """A store is available and rejects the row."""


class Unavailable(PipelineError):
    """A service does not respond; a retry helps, the data is valid."""

    def __init__(self, what: str, detail: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{what} is unavailable: {detail}")
        self.what = what
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class StoreUnavailable(Unavailable):
    """Milvus, Redis or the artifact store does not respond."""


class StoreBusy(StoreUnavailable):
    """This process has more calls to a store at once than connections, and a call waited too long for one."""


class BrokerUnavailable(Unavailable):
    """Kafka does not respond."""


class ContentUnavailable(Unavailable):
    """An item's image cannot be fetched at this time."""


class EncoderUnavailable(Unavailable):
    """The encoder fails for every content: its device has no memory left, or is gone."""


class Misconfigured(PipelineError):
    """A setting is wrong or missing; the message names it and the fix."""


class Fenced(PipelineError):
    """Another process has this role now; this one must not write any more."""
