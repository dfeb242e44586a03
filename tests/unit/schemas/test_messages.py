"""Messages: what is accepted, what is refused and with which reason. One sample per topic and version keeps parsing."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.base import decode, is_identifier
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, Reason
from schemas.field_maps import FieldMap
from schemas.item_states import ItemState
from schemas.items import ImageRetry, ItemEmbedding, ItemPublished, embedding_key, parse_embedding_key
from schemas.letters import DeadLetter
from schemas.manifests import ReleaseNotice
from schemas.queries import QueryEmbedding
from schemas.skew import SkewRecord
from schemas.times import EARLIEST_EVENT, units_per_second
from tests.factories.messages import ITEM, NOW, item, read

SAMPLES = Path(__file__).parent / "samples"
SCHEMA_OF_TOPIC = {
    "items": ItemPublished,
    "behaviours": Behaviour,
    "embeddings": ItemEmbedding,
    "queries": QueryEmbedding,
    "item-states": ItemState,
    "skew": SkewRecord,
    "items-retry": ImageRetry,
    "models": ReleaseNotice,
}


CLICK = {"event_id": "e", "kind": "click", "user_id": "u", "item_id": "a", "occurred_at": "2026-01-01T00:00:00Z"}


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
    "endless price": (json.dumps(item(price=0)).replace("0}", "1e999}").encode(), Reason.WRONG_TYPE),
    "endless price as text": (item(price="inf"), Reason.WRONG_TYPE),
    "year before the calendar": (item(year=-1), Reason.WRONG_TYPE),
    "year after the calendar": (item(year=10_000), Reason.WRONG_TYPE),
    "another event": (item(event="delete"), Reason.WRONG_TYPE),
    "flag as id": (item(item_id=True), Reason.WRONG_TYPE),
    "version before the first": (item(schema_version=0), Reason.UNKNOWN_VERSION),
    "first year of the calendar": (item(published_at="0001-06-01T00:00:00Z"), Reason.WRONG_TYPE),
    "last year of the calendar": (item(published_at="9999-06-01T00:00:00Z"), Reason.WRONG_TYPE),
    "nested too deeply": (b"[" * 9_000, Reason.NOT_JSON),
    "second time without zone": (item(updated_at="2026-01-01T00:00:00"), Reason.TIMESTAMP_WITHOUT_ZONE),
    "second time in the far future": (item(updated_at="2999-01-01T00:00:00Z"), Reason.TIMESTAMP_IN_FUTURE),
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


def test_a_message_does_not_change_once_it_is_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read(item()).title = "coat"


def test_a_clock_slightly_ahead_is_accepted() -> None:
    soon = (NOW + timedelta(minutes=30)).isoformat()
    assert read(item(published_at=soon)).item_id == "a"


NOTHING = [None, "", "  "]
OPTIONAL_OF_ITEMS = [
    *("schema_version", "event", "text", "category", "price", "year", "image", "image_url", "updated_at"),
    *("attributes", "published_at_is"),
]
OPTIONAL_OF_BEHAVIOURS = [
    *("schema_version", "exposure_id", "query_text", "query_image", "trigger_item", "defines_publish"),
    *("drawn_from", "drawn_at", "price", "qty"),
]


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("field_map", [None, {"updated_at": "updated_at"}])
def test_optional_fields_that_say_nothing_are_absent(nothing: str | None, field_map: FieldMap | None) -> None:
    for name in OPTIONAL_OF_ITEMS:
        found = read(item(**{name: nothing}), field_map=field_map)
        assert found.model_dump() | {name: None} == read(item()).model_dump() | {name: None}
        assert found.content_hash() == read(item()).content_hash() or name in ("text", "category", "image_url")
    untitled = read(item(title=nothing, image_url="https://a.example/1.jpg"), field_map=field_map)
    assert not untitled.title.strip()
    for name in OPTIONAL_OF_BEHAVIOURS:
        found_too = read(behaviour(**{name: nothing}), Behaviour)
        assert found_too.model_dump() | {name: None} == read(behaviour(), Behaviour).model_dump() | {name: None}
    many = dict.fromkeys(OPTIONAL_OF_BEHAVIOURS, nothing)
    assert read(behaviour(**many), Behaviour).event_id == "e"


def test_every_optional_field_may_say_nothing() -> None:
    for model, names in ((ItemPublished, [*OPTIONAL_OF_ITEMS, "title"]), (Behaviour, OPTIONAL_OF_BEHAVIOURS)):
        assert sorted(names) == sorted(n for n, field in model.model_fields.items() if not field.is_required())


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("name", ["item_id", "user_id", "event_id", "kind", "occurred_at"])
def test_a_required_field_that_says_nothing_is_named(name: str, nothing: str | None) -> None:
    assert name in refusal(behaviour(**{name: nothing, "exposure_id": ""}), Behaviour).detail


@pytest.mark.parametrize("form", [1, 1_000, 1_000_000, 1_000_000_000, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_unit_of_a_time_follows_from_its_size(form: float, as_text: bool) -> None:
    number = 1_767_225_600 * form
    message = read(behaviour(occurred_at=str(int(number)) if as_text else number), Behaviour)
    assert message.occurred_at == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("number", "unit"),
    [(0, 1), (2e10, 1), (20_000_000_001, 1_000), (2e13, 1_000), (20_000_000_000_001, 1_000_000), (2e16, 1_000_000),
     (20_000_000_000_000_004, 10**9), (2e19, 10**9), (2.1e19, None), (-2e10, 1), (-20_000_000_001, 1_000),
     (-2.1e19, None)],
)  # fmt: skip
def test_units_change_at_the_year_2603_on_both_sides_of_1970(number: float, unit: int | None) -> None:
    assert units_per_second(number) == unit


@pytest.mark.parametrize(
    ("value", "looks_like"),
    [
        (1_899, "a time since something else"),
        (1_900, "a year"),
        (2_200, "a year"),
        (2_201, "a time since something else"),
        (3_649, "a time since something else"),
        (3_650, "days since 1970"),
        (80_000, "days since 1970"),
        (80_001, "a time since something else"),
        (190_001, "a date"),
        (202_600, "a time since something else"),
        (202_612, "a date"),
        (202_613, "a time since something else"),
        (220_012, "a date"),
        (189_912, "a time since something else"),
        (20_261_231, "a date"),
        (20_261_331, "a time since something else"),
        (22_010_101, "a time since something else"),
        (-0.5, "a time since something else"),
        (2026, "a year"),
        ("2026", "a year"),
        (20_454, "days since 1970"),
        (20_260_916, "a date"),
        (202_609, "a date"),
        (0, "no time"),
        ("1970-01-01T00:00:00Z", "no time"),
        ("1970-01-01T00:33:46Z", "a year"),
        (-5, "a time since something else"),
        (99_999_999, "a time since something else"),
    ],
)
def test_an_event_before_1973_is_refused_with_what_it_looks_like(value: object, looks_like: str) -> None:
    error = refusal(item(published_at=value), earliest=EARLIEST_EVENT)
    assert error.reason is Reason.TIMESTAMP_TOO_EARLY
    assert "published_at" in error.detail and f"looks like {looks_like}" in error.detail
    assert refusal(behaviour(occurred_at=value), Behaviour, earliest=EARLIEST_EVENT).reason is error.reason


def test_each_time_of_a_message_is_judged_and_named() -> None:
    error = refusal(item(updated_at=2026), earliest=EARLIEST_EVENT)
    assert (error.reason, error.detail.split()[0]) == (Reason.TIMESTAMP_TOO_EARLY, "updated_at")
    later = item(updated_at=(NOW + timedelta(hours=2)).isoformat())
    assert refusal(later).detail.startswith("updated_at is 2026-11-01T02:00:00+00:00, now is 2026-11-01T00:00:00+00:00")
    assert read(later, max_ahead=timedelta(hours=2)).item_id == "a"
    soon = item(published_at=(NOW + timedelta(minutes=1)).isoformat())
    assert refusal(soon, max_ahead=timedelta(0)).reason is Reason.TIMESTAMP_IN_FUTURE


def test_a_date_without_time_is_refused() -> None:
    assert refusal(item(published_at="2026-09-16")).reason is Reason.TIMESTAMP_WITHOUT_ZONE


def test_limits_of_times_are_inside() -> None:
    assert read(item(published_at=100_000_000), earliest=EARLIEST_EVENT).published_at == EARLIEST_EVENT
    last = NOW + timedelta(hours=1)
    assert read(item(published_at=last.isoformat())).published_at == last
    beyond = last + timedelta(microseconds=1)
    assert refusal(item(published_at=beyond.isoformat())).reason is Reason.TIMESTAMP_IN_FUTURE


@pytest.mark.parametrize(
    ("name", "limit"), [("item_id", 200), ("title", 2_000), ("text", 20_000), ("category", 200), ("image_url", 2_000)]
)
def test_the_longest_text_of_an_item_is_accepted_and_one_more_character_is_not(name: str, limit: int) -> None:
    for character in ("x", "\U0001f6cb"):
        fitting, beyond = (json.dumps(item(**{name: character * n})).encode() for n in (limit, limit + 1))
        assert getattr(decode(ItemPublished, fitting, now=NOW, max_bytes=300_000), name) == character * limit
        with pytest.raises(BadMessage, match=name):
            decode(ItemPublished, beyond, now=NOW, max_bytes=300_000)


@pytest.mark.parametrize(
    ("name", "longest"),
    [("event_id", 200), ("user_id", 200), ("item_id", 200), ("exposure_id", 200), ("trigger_item", 200),
     ("query_text", 1_000)],
)  # fmt: skip
def test_the_longest_text_of_a_behaviour_is_accepted_and_one_more_character_is_not(name: str, longest: int) -> None:
    assert getattr(read(behaviour(**{name: "x" * longest}), Behaviour), name) == "x" * longest
    assert name in refusal(behaviour(**{name: "x" * (longest + 1)}), Behaviour).detail


def test_a_record_of_exactly_the_limit_is_accepted() -> None:
    payload = json.dumps(ITEM).encode()
    assert decode(ItemPublished, payload, now=NOW, max_bytes=len(payload)).item_id == "a"
    with pytest.raises(BadMessage, match=f"has {len(payload)} bytes, the limit is {len(payload) - 1}"):
        decode(ItemPublished, payload, now=NOW, max_bytes=len(payload) - 1)


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
    assert read(item(year=1999, price=1)).content_hash() == read(item(year=1999, price=2)).content_hash()
    assert len({read(item(year=year)).content_hash() for year in (1999, 2000)} | {base.content_hash()}) == 3
    others = [item(title="coat"), item(text="x"), item(category="c"), item(image="AAAA"), item(image_url="https://a/b")]
    hashes = {read(other).content_hash() for other in others}
    assert len(hashes | {base.content_hash()}) == len(others) + 1


def test_bounds_of_price_and_year_are_inside() -> None:
    assert [read(item(price=price)).price for price in (0, 1e300)] == [0, 1e300]
    assert [read(item(year=year)).year for year in (0, 9_999)] == [0, 9_999]
    assert read(item(year=0)).content_hash() != read(item()).content_hash()


@pytest.mark.parametrize("content", [{"text": "x"}, {"image": "AAAA"}, {"image_url": "https://a.example/b"}])
def test_any_content_is_enough(content: dict[str, str]) -> None:
    assert read(item(title=..., **content)).title == ""
    assert refusal(item(title="", text=" \n", image="", image_url="")).reason is Reason.NO_CONTENT


def test_content_hashes_stay_those_of_earlier_releases_and_no_field_runs_into_the_next() -> None:
    """What the center holds was hashed by them: another hash encodes every item again."""
    whole = item(title="Café", text="of wool", category="Coats", image="AAAA", image_url="https://a.example/b")
    assert read(whole).content_hash() == "abdf7cb70162ab09d121cbeb28221737"
    assert read(whole | {"year": 2001}).content_hash() == "6dbff49ff2f62b6933a5f4e74ce3c986"
    assert (
        read(item(title="Café", image_url="https://a.example/b")).content_hash() == "7121612e4fee54a08afa2ac11b019cd2"
    )
    assert read(whole | {"image_url": "https://a.example/c"}).content_hash() == read(whole).content_hash()
    pairs = [item(title="a", text="bc"), item(title="ab", text="c"), item(title="abc"), item(title="a", category="bc")]
    assert len({read(one).content_hash() for one in pairs}) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [({"dim": 0}, "dim"), ({"dim": 8193}, "dim"), ({"source": {"partition": -1, "offset": 0}}, "source.partition"),
     ({"source": {"partition": 0, "offset": -1}}, "source.offset"), ({"encoder_version": "a:b"}, "encoder_version")],
)  # fmt: skip
def test_a_row_out_of_bounds_is_refused_with_the_place_of_the_field(change: dict[str, object], told: str) -> None:
    sample = json.loads((SAMPLES / "embeddings-v1.json").read_text())
    error = refusal(sample | change, ItemEmbedding)
    assert error.reason is Reason.WRONG_TYPE and error.detail.startswith(f"{told}: ")


@pytest.mark.parametrize("dim", [1, 8192])
def test_the_narrowest_and_the_widest_vector_are_read(dim: int) -> None:
    sample = json.loads((SAMPLES / "embeddings-v1.json").read_text())
    row = sample | {"dim": dim, "vector": base64.b64encode(bytes(4 * dim)).decode()}
    row["source"] = {"partition": 0, "offset": 0}
    assert decode(ItemEmbedding, json.dumps(row).encode(), now=NOW, max_bytes=100_000).dim == dim


@pytest.mark.parametrize(
    ("change", "fits"),
    [({"attempt": 1}, True), ({"attempt": 0}, False), ({"failed_before": 0}, True), ({"failed_before": -1}, False)],
)
def test_a_late_picture_has_failed_once_or_more(change: dict[str, object], fits: bool) -> None:
    sample = json.loads((SAMPLES / "items-retry-v1.json").read_text()) | change
    assert (read(sample, ImageRetry) is not None) if fits else refusal(sample, ImageRetry)


def test_embedding_of_the_wrong_width_is_refused() -> None:
    sample = json.loads((SAMPLES / "embeddings-v1.json").read_text())
    with pytest.raises(BadMessage, match="float32"):
        read(sample | {"dim": 3}, ItemEmbedding)


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=50).filter(is_identifier))
def test_embedding_keys_survive_any_item_id(item_id: str) -> None:
    assert parse_embedding_key(embedding_key("enc-1.2", item_id)) == ("enc-1.2", item_id)


def test_a_colon_of_an_item_is_its_own() -> None:
    assert parse_embedding_key(b"v:a:b") == ("v", "a:b")
    with pytest.raises(ValueError, match="not a key"):
        parse_embedding_key(None)


@pytest.mark.parametrize("key", [b"", b"abc", b":x", b"v:", b"v: a", b"v:a\n", b"v:a\0", b"v:" + b"x" * 201])
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
