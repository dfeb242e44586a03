"""Messages: what is accepted, what is refused and with which reason. One sample per topic and version keeps parsing."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from schemas.base import ItemId, decode
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import BadMessage, Reason
from schemas.items import ImageRetry, ItemEmbedding, ItemPublished, embedding_key, parse_embedding_key
from schemas.letters import DeadLetter
from schemas.manifests import ReleaseNotice
from schemas.scoring import MAX_CANDIDATES, ScoreRequest

NOW = datetime(2026, 11, 1, tzinfo=UTC)
SAMPLES = Path(__file__).parent / "samples"
SCHEMA_OF_TOPIC = {
    "items": ItemPublished,
    "behaviours": Behaviour,
    "embeddings": ItemEmbedding,
    "items-retry": ImageRetry,
    "models": ReleaseNotice,
}


def read(payload: object, model: type = ItemPublished, **over: object):  # type: ignore[no-untyped-def]
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return decode(model, raw, now=NOW, max_bytes=10_000, **over)  # type: ignore[arg-type]


ITEM = {"item_id": "a", "title": "shirt", "published_at": "2026-01-01T00:00:00Z"}
CLICK = {"event_id": "e", "kind": "click", "user_id": "u", "item_id": "a", "occurred_at": "2026-01-01T00:00:00Z"}


def item(**over: object) -> dict[str, object]:
    return {name: value for name, value in (ITEM | over).items() if value is not ...}


def behaviour(**over: object) -> dict[str, object]:
    return {name: value for name, value in (CLICK | over).items() if value is not ...}


def refusal(payload: object, model: type = ItemPublished, **over: object) -> BadMessage:
    with pytest.raises(BadMessage) as caught:
        read(payload, model, **over)
    return caught.value


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_version_ever_sent_still_parses_and_survives_a_round_trip(sample: Path) -> None:
    topic = sample.stem.rsplit("-v", 1)[0]
    message = read(sample.read_bytes(), SCHEMA_OF_TOPIC[topic])
    assert read(message.model_dump_json().encode(), SCHEMA_OF_TOPIC[topic]) == message


def test_every_topic_with_a_schema_has_a_sample() -> None:
    assert {path.stem.rsplit("-v", 1)[0] for path in SAMPLES.glob("*.json")} == set(SCHEMA_OF_TOPIC)


BROKEN_ITEMS = {
    "not json": (b"{nope", Reason.NOT_JSON),
    "empty": (b"", Reason.NOT_JSON),
    "a list": ([1], Reason.WRONG_TYPE),
    "no id": (item(item_id=...), Reason.WRONG_TYPE),
    "empty id": (item(item_id=""), Reason.WRONG_TYPE),
    "control characters in id": (item(item_id="a\nb"), Reason.WRONG_TYPE),
    "very long id": (item(item_id="a" * 201), Reason.WRONG_TYPE),
    "title is a number": (item(title=7), Reason.WRONG_TYPE),
    "price is not a number": (item(price="cheap"), Reason.WRONG_TYPE),
    "negative price": (item(price=-1), Reason.WRONG_TYPE),
    "image is not base64": (item(image="%%%"), Reason.WRONG_TYPE),
    "neither title nor picture": (item(title=" "), Reason.NO_CONTENT),
    "unknown version": (item(schema_version=99), Reason.UNKNOWN_VERSION),
    "no zone": (item(published_at="2026-01-01T00:00:00"), Reason.TIMESTAMP_WITHOUT_ZONE),
    "far future": (item(published_at="2999-01-01T00:00:00Z"), Reason.TIMESTAMP_IN_FUTURE),
    "too large": (item(text="x" * 10_001), Reason.TOO_LARGE),
}


@pytest.mark.parametrize(("payload", "reason"), BROKEN_ITEMS.values(), ids=BROKEN_ITEMS.keys())
def test_broken_item_is_refused_with_its_reason(payload: object, reason: Reason) -> None:
    error = refusal(payload)
    assert error.reason is reason and error.detail


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (behaviour(kind="stare"), Reason.WRONG_TYPE),
        (behaviour(event_id=...), Reason.WRONG_TYPE),
        (behaviour(occurred_at="yesterday"), Reason.WRONG_TYPE),
        (behaviour(occurred_at="2026-01-01 10:00"), Reason.TIMESTAMP_WITHOUT_ZONE),
        (behaviour(occurred_at=4_000_000_000), Reason.TIMESTAMP_IN_FUTURE),
        (behaviour(schema_version=2), Reason.UNKNOWN_VERSION),
    ],
)
def test_broken_behaviour_is_refused_with_its_reason(payload: object, reason: Reason) -> None:
    assert refusal(payload, Behaviour).reason is reason


def test_a_clock_slightly_ahead_is_accepted() -> None:
    soon = (NOW + timedelta(minutes=30)).isoformat()
    assert read(item(published_at=soon)).item_id == "a"


def test_numbers_are_accepted_as_identifiers_and_times() -> None:
    message = read(behaviour(item_id=42, occurred_at=1_767_225_600), Behaviour)
    assert (message.item_id, message.occurred_at) == ("42", datetime(2026, 1, 1, tzinfo=UTC))


def test_a_platforms_own_names_are_mapped_by_settings() -> None:
    payload = {"sku": 5, "name": {"en": "shirt"}, "pics": [{"href": "https://a.example/x.jpg"}], "ts": 1_767_225_600}
    field_map = {"item_id": "sku", "title": "name.en", "image_url": "pics.0.href", "published_at": "ts"}
    message = read(payload, field_map=field_map)
    assert (message.item_id, message.title, message.image_url) == ("5", "shirt", "https://a.example/x.jpg")


@pytest.mark.parametrize("payload", [b"[1]", b"7", b"{", b"[" * 5_000])
def test_mapped_input_that_is_no_object_is_refused(payload: bytes) -> None:
    assert refusal(payload, field_map={"item_id": "sku"})


def test_price_and_dates_do_not_change_the_content_hash_and_content_does() -> None:
    base = read(item(price=1))
    assert base.content_hash() == read(item(price=2, published_at="2025-01-01T00:00:00Z")).content_hash()
    others = [item(title="coat"), item(text="x"), item(category="c"), item(image="AAAA"), item(image_url="https://a/b")]
    hashes = {read(other).content_hash() for other in others}
    assert len(hashes | {base.content_hash()}) == len(others) + 1


def test_embedding_of_the_wrong_width_is_refused() -> None:
    sample = json.loads((SAMPLES / "embeddings-v1.json").read_text())
    with pytest.raises(BadMessage, match="float32"):
        read(sample | {"dim": 3}, ItemEmbedding)


@given(st.text(min_size=1, max_size=50).filter(lambda text: text.isprintable()))
def test_embedding_keys_survive_any_item_id(item_id: str) -> None:
    assert parse_embedding_key(embedding_key("enc-1.2", item_id)) == ("enc-1.2", item_id)


@pytest.mark.parametrize("key", [b"", b"abc", b":x", b"v:"])
def test_foreign_embedding_keys_are_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="not a key"):
        parse_embedding_key(key)


@given(st.none() | st.binary(max_size=50), st.none() | st.binary(max_size=50), st.text(max_size=2_000))
def test_dead_letters_keep_the_original_bytes_and_survive_a_round_trip(
    key: bytes | None, value: bytes | None, detail: str
) -> None:
    letter = DeadLetter(
        topic="items", partition=1, offset=7, key=key, value=value, stage="decode", reason=Reason.NOT_JSON,
        detail=detail[:1_000], failed_at=NOW, attempts=3,
    )  # fmt: skip
    assert DeadLetter.from_record(letter.value, letter.headers()) == letter


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(payload: bytes) -> None:
    for model in SCHEMA_OF_TOPIC.values():
        assert refusal(payload, model)


def test_kinds_that_are_takes() -> None:
    assert [kind.value for kind in BehaviourKind if kind.is_take] == ["click", "cart", "purchase"]


ODD_IDS = ["a", "item 1", " a", "a ", "\u00a0", "a\u2028b", "x" * 200, "x" * 201, 7, True, None, 1.5]


@given(st.lists(st.text(max_size=3) | st.sampled_from(ODD_IDS), max_size=4))
def test_candidates_that_pass_at_once_are_those_that_pass_one_by_one(ids: list[object]) -> None:
    one_by_one = TypeAdapter(Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)])
    try:
        expected: object = one_by_one.validate_json(json.dumps(ids))
    except ValidationError as error:
        expected = [(("item_ids", *each["loc"]), each["msg"]) for each in error.errors()]
    try:
        found: object = ScoreRequest.model_validate_json(json.dumps({"user_id": "u", "item_ids": ids})).item_ids
    except ValidationError as error:
        found = [(each["loc"], each["msg"]) for each in error.errors()]
    assert found == expected
