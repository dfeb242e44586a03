"""Records of invented shops in the shapes of real feeds, and the settings that the documents give for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "deploy" / "field-maps.md"


def recipe(heading: str) -> str:
    """The settings below a heading of the page, in TOML."""
    found = re.search(rf"^## {heading}.*?^```toml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert found is not None, heading
    return found[1]


def recipes() -> list[str]:
    """All headings of the page."""
    return re.findall(r"^## (.+)$", PAGE.read_text(), re.M)


def shopify(**over: Any) -> dict[str, Any]:
    """A product of a furniture shop as a webhook sends it."""
    return {
        "admin_graphql_api_id": "gid://shopify/Product/9120047",
        "id": 9120047,
        "title": "Oak stool Fjell",
        "body_html": "<p>Three legs, <b>oiled</b>.</p>",
        "vendor": "Holzwerk Nord",
        "product_type": "Stools",
        "category": {"admin_graphql_api_id": "gid://shopify/TaxonomyCategory/fr-7", "name": "Stools"},
        "handle": "oak-stool-fjell",
        "created_at": "2026-03-02T09:15:00+01:00",
        "published_at": "2026-03-05T08:00:00+01:00",
        "updated_at": "2026-09-14T17:03:22+02:00",
        "status": "active",
        "tags": "oak, new",
        "template_suffix": None,
        "variants": [
            {"id": 1, "title": "45 cm", "price": "129.00", "compare_at_price": None, "position": 1},
            {"id": 2, "title": "65 cm", "price": "149.00", "compare_at_price": "169.00", "position": 2},
        ],
        "options": [{"name": "Height", "values": ["45 cm", "65 cm"]}],
        "images": [{"id": 31, "src": "https://cdn.holzwerk.example/fjell-1.jpg"}, {"id": 32, "src": "https://b"}],
        "image": {"id": 31, "position": 1, "src": "https://cdn.holzwerk.example/fjell-1.jpg"},
    } | over


def merchant_center(**over: Any) -> dict[str, Any]:
    """A product of a lamp shop as a resource of the Content API."""
    return {
        "kind": "content#product",
        "id": "online:de:DE:LMP-77",
        "offerId": "LMP-77",
        "source": "feed",
        "title": "Pendant lamp Halo",
        "description": "Spun aluminium, E27.",
        "link": "https://licht.example/halo",
        "imageLink": "https://licht.example/halo.jpg",
        "contentLanguage": "de",
        "targetCountry": "DE",
        "channel": "online",
        "availability": "in stock",
        "condition": "new",
        "brand": "Licht",
        "googleProductCategory": "3006",
        "productTypes": ["Home > Lamps > Pendant", "Design"],
        "price": {"value": "89.90", "currency": "EUR"},
    } | over


def debezium(op: str, **row: Any) -> dict[str, Any]:
    """A change of a row of a table of products."""
    product = {
        "sku": "tea-12",
        "name": "Darjeeling first flush",
        "description": "",
        "department": "Tea",
        "price": "14.50",
        "picture": "https://tee.example/tea-12.jpg",
        "created_at": 1_772_438_400_123_456,
    } | row
    return {
        "before": None if op in "cr" else product,
        "after": None if op == "d" else product,
        "source": {"version": "3.0", "connector": "postgresql", "ts_ms": 1_789_546_000_000, "table": "products"},
        "transaction": None,
        "op": op,
        "ts_ms": 1_789_546_000_500,
        "ts_us": 1_789_546_000_500_321,
        "ts_ns": 1_789_546_000_500_321_987,
    }


def segment(event: str, properties: dict[str, Any], **over: Any) -> dict[str, Any]:
    """A track event of a shoe shop."""
    return {
        "anonymousId": "a-5f3c",
        "userId": "u-901",
        "channel": "browser",
        "context": {"ip": "203.0.113.7", "page": {"path": "/shoes"}, "userAgent": "Mozilla/5.0"},
        "event": event,
        "integrations": {},
        "messageId": "ajs-next-1789546000500-ab12",
        "originalTimestamp": "2026-09-16T09:26:41.001Z",
        "properties": properties,
        "receivedAt": "2026-09-16T09:26:41.310Z",
        "sentAt": "2026-09-16T09:26:41.003Z",
        "timestamp": "2026-09-16T09:26:40.990Z",
        "type": "track",
        "version": 1,
    } | over


def ga4(event_name: str, *item_ids: str, **over: Any) -> dict[str, Any]:
    """A row of the export of a plant shop; integers are text in its JSON."""
    return {
        "event_date": "20260916",
        "event_timestamp": "1789550801000321",
        "event_name": event_name,
        "event_params": [{"key": "ga_session_id", "value": {"string_value": None, "int_value": "17"}}],
        "event_bundle_sequence_id": "4",
        "user_id": None,
        "user_pseudo_id": "1184.5521",
        "device": {"category": "mobile"},
        "platform": "WEB",
        "items": [
            {"item_id": item_id, "item_name": "Fern", "item_list_name": "Shade", "price": 12.5} for item_id in item_ids
        ],
    } | over


CLOUD_DATA = {"customer": "c-77", "shown_by": "", "id": "another id", "time": "noon"}
CLOUD_EVENT = {
    "specversion": "1.0",
    "id": "4711",
    "source": "/shops/berlin",
    "type": "shop.product.opened",
    "subject": "mug-3",
    "time": "2026-09-16T09:26:40Z",
    "datacontenttype": "application/json",
}


def cloud_structured(**over: Any) -> dict[str, Any]:
    """An event of a shop of mugs in one document."""
    return CLOUD_EVENT | {"data": CLOUD_DATA} | over


def cloud_binary(**over: str) -> list[tuple[str, bytes | None]]:
    """The headers of the same event, beside `CLOUD_DATA` as the value."""
    attributes = {f"ce_{name}": value for name, value in CLOUD_EVENT.items() if name != "datacontenttype"} | over
    return [("content-type", b"application/json"), *((name, value.encode()) for name, value in attributes.items())]
