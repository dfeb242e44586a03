"""Feeds of real shapes are read with the settings that the documents give for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, Reason
from schemas.items import ItemPublished
from schemas.letters import DeadLetter
from streams.broker.records import SourceRecord, read_behaviour
from streams.encoder_training.topic_input import TopicContent, _add_item
from streams.indexing.item_changes import read_change
from streams.settings import Settings, load_settings
from tests.factories.fake_consumer import FakeRecord
from tests.factories.feeds import (
    CLOUD_DATA,
    cloud_binary,
    cloud_structured,
    debezium,
    ga4,
    merchant_center,
    recipe,
    recipes,
    segment,
    shopify,
)

NOW = datetime(2026, 9, 16, 10, tzinfo=UTC)
PRODUCED_MS = round(NOW.timestamp() * 1000)
Headers = list[tuple[str, bytes | None]]


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Settings]:
    def load(heading: str) -> Settings:
        file = tmp_path / "mim.toml"
        file.write_text(recipe(heading))
        return load_settings(file)

    return load


def read_item(settings: Settings, key: str, document: Any) -> ItemPublished | None:
    value = None if document is None else json.dumps(document).encode()
    record = SourceRecord("items", 0, 0, PRODUCED_MS, key.encode(), value)
    change = read_change(record, max_bytes=100_000, max_ahead=timedelta(hours=1), field_map=settings.index.field_map)
    taught = TopicContent(items={key: None} if value is None else {})  # type: ignore[dict-item]
    _add_item(taught, FakeRecord(0, 0, record.key, value, PRODUCED_MS), settings.kafka, settings.index.field_map)
    assert taught.items == ({} if change.item is None else {key: change.item})
    return change.item


def read_event(settings: Settings, key: str, document: Any, headers: Headers | None = None) -> Behaviour:
    value = json.dumps(document).encode()
    record = FakeRecord(0, 0, key.encode(), value, PRODUCED_MS, tuple(headers or ()))
    return read_behaviour(record, max_bytes=100_000, field_map=settings.record.field_map)


def test_every_recipe_of_the_page_is_one_that_is_tested_here() -> None:
    heads = [heading.partition(":")[0] for heading in recipes()]
    assert heads == ["Shopify", "Google Merchant Center", "Debezium", "Segment", "GA4", "CloudEvents", "CloudEvents"]


def test_shopify_products(load: Callable[[str], Settings]) -> None:
    settings = load("Shopify")
    item = read_item(settings, "9120047", shopify())
    assert item == ItemPublished(
        item_id="9120047",
        title="Oak stool Fjell",
        text="<p>Three legs, <b>oiled</b>.</p>",
        category="Stools",
        price=129,
        image_url="https://cdn.holzwerk.example/fjell-1.jpg",
        published_at=datetime(2026, 3, 5, 7, tzinfo=UTC),
        updated_at=datetime(2026, 9, 14, 15, 3, 22, tzinfo=UTC),
    )
    draft = read_item(settings, "9120047", shopify(published_at=None, image=None, images=[], body_html=None))
    assert draft is not None and draft.published_at == datetime(2026, 3, 2, 8, 15, tzinfo=UTC)
    assert (draft.image_url, draft.text) == (None, "")
    assert read_item(settings, "9120047", None) is None
    with pytest.raises(BadMessage, match="published_at"):
        read_item(settings, "9120047", {"id": 9120047})  # the body of products/delete


def test_merchant_center_products(load: Callable[[str], Settings]) -> None:
    settings = load("Google Merchant Center")
    item = read_item(settings, "LMP-77", merchant_center())
    assert item == ItemPublished(
        item_id="LMP-77",
        title="Pendant lamp Halo",
        text="Spun aluminium, E27.",
        category="Home > Lamps > Pendant",
        price=89.9,
        image_url="https://licht.example/halo.jpg",
        published_at=NOW,
    )
    later = read_item(settings, "LMP-77", merchant_center(availabilityDate="2026-09-10T00:00:00Z", productTypes=[]))
    assert later is not None and (later.published_at.day, later.category) == (10, "3006")
    with pytest.raises(BadMessage, match="price"):
        read_item(settings, "LMP-77", merchant_center(price={"value": "89,90"}))


def test_debezium_changes(load: Callable[[str], Settings]) -> None:
    settings = load("Debezium")
    for op in ("c", "r", "u"):
        item = read_item(settings, "tea-12", debezium(op))
        assert item == ItemPublished(
            item_id="tea-12",
            event="update" if op == "u" else "publish",
            title="Darjeeling first flush",
            category="Tea",
            price=14.5,
            image_url="https://tee.example/tea-12.jpg",
            published_at=datetime(2026, 3, 2, 8, 0, 0, 123_456, tzinfo=UTC),
            updated_at=datetime(2026, 9, 16, 8, 6, 40, 500_000, tzinfo=UTC),
        )
    with pytest.raises(BadMessage, match="item_id"):
        read_item(settings, "tea-12", debezium("d"))
    assert read_item(settings, "tea-12", None) is None


def test_segment_tracks(load: Callable[[str], Settings]) -> None:
    settings = load("Segment")
    kinds = {"Product List Viewed": "exposure", "Product Viewed": "click", "Product Added": "cart"}
    for name, kind in kinds.items():
        found = read_event(settings, "u-901", segment(name, {"product_id": "shoe-4", "query": "boots"}))
        assert found == Behaviour.model_validate(
            {
                "event_id": "ajs-next-1789546000500-ab12-shoe-4",
                "kind": kind,
                "user_id": "u-901",
                "item_id": "shoe-4",
                "occurred_at": "2026-09-16T09:26:40.990Z",
                "query_text": "boots",
            }
        )
    stranger = segment("Product Clicked", {"product_id": "shoe-4"}, userId=None)
    assert read_event(settings, "a-5f3c", stranger).user_id == "a-5f3c"
    bought = {"order_id": "o-1", "products": [{"product_id": "shoe-4"}]}
    assert read_event(settings, "u-901", segment("Order Completed", bought)).item_id == "shoe-4"
    several = bought | {"products": [{"product_id": "shoe-4"}, {"product_id": "shoe-5"}]}
    with pytest.raises(BadMessage, match="a list of 2"):
        read_event(settings, "u-901", segment("Order Completed", several))
    with pytest.raises(BadMessage, match="kind"):
        read_event(settings, "u-901", segment("Page Scrolled", {"product_id": "shoe-4"}))


def test_ga4_rows(load: Callable[[str], Settings]) -> None:
    settings = load("GA4")
    kinds = {"view_item_list": "exposure", "select_item": "click", "add_to_cart": "cart", "purchase": "purchase"}
    for name, kind in kinds.items():
        assert read_event(settings, "1184.5521", ga4(name, "fern-2")) == Behaviour.model_validate(
            {
                "event_id": f"1184.5521-1789550801000321-{name}-fern-2",
                "kind": kind,
                "user_id": "1184.5521",
                "item_id": "fern-2",
                "occurred_at": "2026-09-16T09:26:41.000321Z",
            }
        )
    known = ga4("purchase", "fern-2", user_id="m-3", event_timestamp=1_789_550_801_000_321)
    assert read_event(settings, "m-3", known).occurred_at.microsecond == 321
    with pytest.raises(BadMessage, match="a list of 2"):
        read_event(settings, "1184.5521", ga4("purchase", "fern-2", "moss-1"))
    with pytest.raises(BadMessage, match="event_id"):
        read_event(settings, "1184.5521", ga4("purchase"))


CLOUD = {
    "event_id": "/shops/berlin-4711",
    "kind": "click",
    "user_id": "c-77",
    "item_id": "mug-3",
    "occurred_at": "2026-09-16T09:26:40Z",
}


def test_cloud_events_in_structured_mode(load: Callable[[str], Settings]) -> None:
    settings = load("CloudEvents: structured")
    assert read_event(settings, "c-77", cloud_structured()) == Behaviour.model_validate(CLOUD)
    shown = cloud_structured(data={"customer": "c-77", "shown_by": "/shops/berlin-4710"})
    assert read_event(settings, "c-77", shown).exposure_id == "/shops/berlin-4710"
    with pytest.raises(BadMessage, match="kind"):
        read_event(settings, "c-77", cloud_structured(type="shop.stock.counted"))


def test_cloud_events_in_binary_mode(load: Callable[[str], Settings]) -> None:
    settings = load("CloudEvents: binary")
    assert read_event(settings, "c-77", CLOUD_DATA, cloud_binary()) == Behaviour.model_validate(CLOUD)
    for missing in ("ce_id", "ce_type", "ce_time", "ce_subject"):
        rest = [header for header in cloud_binary() if header[0] != missing]
        with pytest.raises(BadMessage):
            read_event(settings, "c-77", CLOUD_DATA, rest)
    with pytest.raises(BadMessage, match="occurred_at"):
        read_event(settings, "c-77", CLOUD_DATA, cloud_binary(ce_time="\u00ff"))


def test_a_dead_letter_keeps_the_headers_that_a_field_map_reads(load: Callable[[str], Settings]) -> None:
    headers = (*cloud_binary(ce_type="shop.stock.counted"), ("empty", None), ("attempts", b"foreign"))
    record = SourceRecord("behaviours", 0, 7, PRODUCED_MS, b"c-77", b"{}", headers)
    letter = record.letter("record", BadMessage(Reason.WRONG_TYPE, "kind"), failed_at=NOW)
    kept = DeadLetter.from_record(letter.value, letter.headers())
    assert kept == letter
    assert kept.record_headers == headers[:-1]


def test_headers_too_large_for_a_letter_are_left_out_of_it() -> None:
    for size, kept in ((8_000, True), (9_000, False)):
        record = SourceRecord("behaviours", 0, 7, PRODUCED_MS, b"c", b"{}", (("ce_id", b"x" * size),))
        letter = record.letter("record", BadMessage(Reason.WRONG_TYPE, "kind"), failed_at=NOW)
        assert bool(letter.record_headers) is kept


def test_an_event_before_1973_is_a_dead_letter_in_either_topic(load: Callable[[str], Settings]) -> None:
    settings = load("Shopify")
    with pytest.raises(BadMessage, match="looks like a year") as caught:
        read_item(settings, "9120047", shopify(published_at=2026))
    assert caught.value.reason is Reason.TIMESTAMP_TOO_EARLY
    with pytest.raises(BadMessage, match="looks like a date"):
        read_event(load("Segment"), "u-901", segment("Product Added", {"product_id": "a"}, timestamp=20_260_916))
