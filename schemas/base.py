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
    FiniteFloat,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from schemas.errors import BadMessage, Reason
from schemas.field_maps import Envelope, FieldMap, is_blank, mapped
from schemas.times import too_early, units_per_second

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


def is_identifier(text: str) -> bool:
    """Whether a text is an `Identifier`: what the type decides, for many texts at once."""
    return 0 < len(text) <= MAX_ID_CHARACTERS and text.isprintable() and text == text.strip()


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


def _fine_units_to_seconds(value: object) -> object:
    """A number in us or ns since 1970 in seconds; anything else as it is, since pydantic reads seconds and ms."""
    number = int(value) if isinstance(value, str) and len(value) < 25 and value.isdecimal() else value
    if isinstance(number, int | float) and not isinstance(number, bool):
        unit = units_per_second(number)
        return number / unit if unit and unit > 1_000 else value
    return value


Price = Annotated[FiniteFloat, Field(ge=0)]
"""An amount of money, in the shop's unit."""

UtcTime = Annotated[AwareDatetime, BeforeValidator(_fine_units_to_seconds), AfterValidator(_in_the_calendar)]
"""A time with a zone: ISO 8601 text with an offset, or a number since 1970 in UTC (seconds; ms beyond 2e10, us beyond
2e13, ns beyond 2e16)."""


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
    field_map: FieldMap | None = None,
    envelope: Envelope | None = None,
    max_ahead: timedelta = timedelta(hours=1),
    earliest: datetime | None = None,
) -> M:
    """Turn the bytes of a record into a validated message.

    `field_map` says where a platform's records hold our fields (`schemas/field_maps.py`), `envelope` what the record
    has beside its value. Optional fields that are null or blank count as absent. Times more than `max_ahead` after
    `now` are rejected, and those before `earliest`.

    Raises `BadMessage` with a stable reason and a text that names the field.
    """
    if len(payload) > max_bytes:
        raise BadMessage(Reason.TOO_LARGE, f"record has {len(payload)} bytes, the limit is {max_bytes}")
    try:
        if field_map:
            document = mapped(_parse_object(payload), field_map, envelope or Envelope(now))
            message = model.model_validate(_without_blanks(model, document))
        else:
            message = validate_json(model, payload)
    except ValidationError as error:
        raise _as_bad_message(error) from None
    for name, value in message.__dict__.items():
        if isinstance(value, datetime):
            if value - now > max_ahead:
                raise BadMessage(Reason.TIMESTAMP_IN_FUTURE, f"{name} is {value.isoformat()}, now is {now.isoformat()}")
            if earliest is not None and value < earliest:
                raise BadMessage(
                    Reason.TIMESTAMP_TOO_EARLY,
                    f"{name} is {too_early(value.timestamp())}, as ISO 8601 with an offset or as a number since 1970 "
                    "(seconds, ms, us or ns)",
                )
    return message


def validate_json(model: type[M], payload: bytes) -> M:
    """Validate JSON, where optional fields that are null or blank count as absent. Raises `ValidationError`."""
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        try:
            document = json.loads(payload)
        except (ValueError, RecursionError):
            raise error from None
        if not isinstance(document, dict) or len(said := _without_blanks(model, document)) == len(document):
            raise
        return model.model_validate(said)


def _without_blanks(model: type[Message], document: Mapping[str, Any]) -> dict[str, Any]:
    fields = model.model_fields
    return {k: v for k, v in document.items() if not is_blank(v) or k not in fields or fields[k].is_required()}


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
