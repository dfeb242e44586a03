"""The base of all messages: identifiers, times, versions, and decoding of bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Base64Encoder,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    EncodedBytes,
    Field,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from schemas.errors import BadMessage, Reason

MAX_ID_CHARACTERS = 200
"""Longest identifier accepted; Milvus keys and Redis keys are sized by it."""


def _number_to_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _printable(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("identifier has control characters or outer white space")
    return value


Identifier = Annotated[
    str,
    BeforeValidator(_number_to_text),
    Field(min_length=1, max_length=MAX_ID_CHARACTERS),
    AfterValidator(_printable),
]
"""A non-empty printable string of at most 200 characters; whole numbers are accepted and read as text."""

ItemId = Identifier
UserId = Identifier
EventId = Identifier

EncoderVersion = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""Identifies the weights and preprocessing of a vector. Vectors of two versions are never compared."""


def _in_the_calendar(value: datetime) -> datetime:
    if not _FIRST_YEAR < value.year < _LAST_YEAR:  # inside these years no UTC offset leaves the calendar
        raise ValueError(f"the year {value.year} lies at the end of the calendar")
    return value


_FIRST_YEAR, _LAST_YEAR = 1, 9999
_CALENDAR_ENDS_MS = round(datetime(_LAST_YEAR, 1, 1, tzinfo=UTC).timestamp() * 1000)

UtcTime = Annotated[AwareDatetime, AfterValidator(_in_the_calendar)]
"""A time with a zone: ISO 8601 text with an offset, or a number since 1970 in UTC (seconds; ms beyond 2e10)."""


class _StrictBase64(Base64Encoder):
    @classmethod
    def decode(cls, data: bytes) -> bytes:
        try:
            return base64.b64decode(data, validate=True)  # the lenient form drops foreign characters silently
        except ValueError as error:
            raise PydanticCustomError("base64_decode", "not base64: {error}", {"error": str(error)}) from None


Base64 = Annotated[bytes, EncodedBytes(encoder=_StrictBase64)]
"""Bytes encoded as base64 text; any other text is rejected."""


class Message(BaseModel):
    """Base of all messages. Immutable; unknown fields are ignored, so that producers can be upgraded first."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, ser_json_inf_nan="null")


M = TypeVar("M", bound=Message)

_REASON_OF_ERROR_TYPE = {
    "json_invalid": Reason.NOT_JSON,
    "timezone_aware": Reason.TIMESTAMP_WITHOUT_ZONE,
    "no_content": Reason.NO_CONTENT,
    "unknown_version": Reason.UNKNOWN_VERSION,
}


def decode(
    model: type[M],
    payload: bytes,
    *,
    now: datetime,
    max_bytes: int,
    field_map: Mapping[str, str] | None = None,
    max_ahead: timedelta = timedelta(hours=1),
) -> M:
    """Turn the bytes of a record into a validated message.

    `field_map` maps field names to those of the platform (`{"item_id": "sku"}`); dots address nested objects and a
    number an element of a list (`{"image_url": "pics.0.href"}`). Times more than `max_ahead` after `now` are rejected.

    Raises `BadMessage` with a stable reason and a text that names the field.
    """
    if len(payload) > max_bytes:
        raise BadMessage(Reason.TOO_LARGE, f"record has {len(payload)} bytes, the limit is {max_bytes}")
    try:
        if field_map:
            message = model.model_validate(rename_fields(_parse_object(payload), field_map))
        else:
            message = model.model_validate_json(payload)
    except ValidationError as error:
        raise _as_bad_message(error) from None
    for name, value in message.__dict__.items():
        if isinstance(value, datetime) and value - now > max_ahead:
            raise BadMessage(Reason.TIMESTAMP_IN_FUTURE, f"{name} is {value.isoformat()}, now is {now.isoformat()}")
    return message


def produced_at(timestamp_ms: int) -> datetime:
    """Time of production by the Kafka timestamp (ms since 1970), to be passed to `decode` as `now`.

    A second reading of the record then has the same result. Raises `BadMessage` if the record has no timestamp (Kafka's
    -1) or one outside of the calendar, as a number of microseconds is.
    """
    if not 0 <= timestamp_ms < _CALENDAR_ENDS_MS:
        raise BadMessage(
            Reason.RECORD_TIMESTAMP,
            f"the record's own timestamp is {timestamp_ms}, which is no time in milliseconds since 1970; its producer "
            "has to set it right, or not at all",
        )
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC)


def rename_fields(document: Mapping[str, Any], field_map: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `document` with the value at each mapped path, if there is one, under our field name."""
    renamed = dict(document)
    for ours, path in field_map.items():
        value: Any = document
        for step in path.split("."):
            if isinstance(value, Mapping):
                value = value.get(step)
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                value = None
        if value is not None:
            renamed[ours] = value
    return renamed


def _parse_object(payload: bytes) -> dict[str, Any]:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadMessage(Reason.NOT_JSON, str(error)) from None
    if not isinstance(document, dict):
        raise BadMessage(Reason.WRONG_TYPE, f"expected a JSON object, got {type(document).__name__}")
    return document


def _as_bad_message(error: ValidationError) -> BadMessage:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "record"
    return BadMessage(_REASON_OF_ERROR_TYPE.get(first["type"], Reason.WRONG_TYPE), f"{where}: {first['msg']}")
