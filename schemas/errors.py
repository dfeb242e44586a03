"""The error family of the whole system. Each class answers one question: does retrying help?

PipelineError
├── Unprocessable    no retry can help: the record goes to the dead letters
│   ├── BadMessage       the bytes do not say what they should
│   ├── EncodingFailed   the content cannot be turned into a vector
│   └── WriteRejected    a store refuses this very row
├── Unavailable      something outside is down: hold the partition and retry
│   └── StoreUnavailable, BrokerUnavailable, ContentUnavailable
├── Misconfigured    found at start-up: names the setting and the fix
└── Fenced           another process took over this role: stop, write nothing more
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a record is unprocessable. Stable: dashboards and the dead-letter headers carry these words."""

    NOT_JSON = "not_json"
    WRONG_TYPE = "wrong_type"
    UNKNOWN_VERSION = "unknown_version"
    NO_CONTENT = "no_content"
    NO_KEY = "no_key"
    KEY_MISMATCH = "key_mismatch"
    TOO_LARGE = "too_large"
    TIMESTAMP_WITHOUT_ZONE = "timestamp_without_zone"
    TIMESTAMP_IN_FUTURE = "timestamp_in_future"
    RECORD_TIMESTAMP = "record_timestamp"
    BAD_IMAGE = "bad_image"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_REFUSED = "image_refused"
    IMAGE_UNAVAILABLE = "image_unavailable"
    BAD_VECTOR = "bad_vector"
    WRITE_REJECTED = "write_rejected"


class PipelineError(Exception):
    """Root of every error that this system raises on purpose."""


class Unprocessable(PipelineError):
    """Retrying cannot help; the record belongs in the dead letters with `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BadMessage(Unprocessable):
    """The bytes of a record do not say what its topic's schema asks for."""


class EncodingFailed(Unprocessable):
    """The content of one item cannot be turned into a vector."""


class WriteRejected(Unprocessable):
    """A store answered, and refuses this very row."""


class Unavailable(PipelineError):
    """Something outside does not answer now; hold and retry, nothing is wrong with the data."""

    def __init__(self, what: str, detail: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{what} is unavailable: {detail}")
        self.what = what
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class StoreUnavailable(Unavailable):
    """Milvus, Redis or the model folder does not answer."""


class BrokerUnavailable(Unavailable):
    """Kafka does not answer."""


class ContentUnavailable(Unavailable):
    """An item's image cannot be fetched now; it may be later."""


class Misconfigured(PipelineError):
    """A setting is wrong or missing; the message names it and the way out."""


class Fenced(PipelineError):
    """Another process holds this role now; whatever this one still has in hand must not be written."""
