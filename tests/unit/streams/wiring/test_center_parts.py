"""What the center is opened with and what is closed after it, for a worker and for a verification."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import StoreUnavailable
from streams.broker.topics import TOPICS
from streams.center.compare import CenterReport
from streams.settings import Settings
from streams.stores.vectors.collection import CollectionInfo
from streams.wiring import center

SETTINGS = Settings()
ENCODER: Any = SimpleNamespace(version="v1", dim=8)
FOUND = CollectionInfo("items_v1", 8, "v1", is_filled=True)


class Parts:
    """All that the center is made of; notes what is opened and closed, and what each was made with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.given: dict[str, dict[str, Any]] = {}
        self.fails: str | None = None
        self.fetched: list[dict[str, Any]] = []

        def step(name: str) -> Any:
            async def call(*_: Any) -> None:
                self.done.append(name)
                if self.fails == name:
                    raise StoreUnavailable(name, "away")

            return call

        async def fetch(item_ids: Any, **how: Any) -> dict[str, Any]:
            self.fetched.append(how)
            return {}

        def index(*_: Any, **given: Any) -> Any:
            self.given["index"] = given
            return SimpleNamespace(open=step("open index"), close=step("close index"), fetch=fetch)

        def producer(*_: Any, **given: Any) -> Any:
            self.given["producer"] = given
            return SimpleNamespace(start=step("start producer"), stop=step("stop producer"))

        def encoding(*_: Any, **given: Any) -> Any:
            self.given["encoding"] = given
            return SimpleNamespace(close=lambda: self.done.append("close encoding"), version="v1")

        @asynccontextmanager
        async def opened(name: str) -> Any:
            self.done.append(f"open {name}")
            yield SimpleNamespace(picture=name)
            self.done.append(f"close {name}")

        monkeypatch.setattr(center, "MilvusItemIndex", index)
        monkeypatch.setattr(center, "make_producer", producer)
        monkeypatch.setattr(center, "ItemEncoding", encoding)
        monkeypatch.setattr(center, "ImageFetcher", lambda *_: opened("fetcher"))
        monkeypatch.setattr(center, "LogReader", lambda *_: opened("log"))
        monkeypatch.setattr(center, "_share_cores", lambda _: 3)

        class Verification:
            def __init__(verification, *parts: Any, **given: Any) -> None:  # noqa: N805
                self.given["verification"] = given | {"read_rows": parts[2], "scan": parts[3]}

            async def run(verification) -> CenterReport:  # noqa: N805
                await self.given["verification"]["read_rows"](["a"])
                self.done.append("verified")
                return CenterReport()

        monkeypatch.setattr(center, "CenterVerification", Verification)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(monkeypatch)


async def test_everything_that_writes_to_the_center_is_closed_in_the_order_opposite_to_that_of_opening(
    parts: Parts,
) -> None:
    async with center.open_index_context(SETTINGS, ENCODER) as context:
        assert parts.done == ["open index", "start producer", "open fetcher"]
        assert context.fetch == "fetcher"  # type: ignore[comparison-overlap]
    assert parts.done[3:] == ["close fetcher", "close encoding", "stop producer", "close index"]


@pytest.mark.parametrize(
    ("fails", "closed"), [("open index", ["close index"]), ("start producer", ["stop producer", "close index"])]
)
async def test_what_was_made_is_closed_where_something_that_it_needs_is_away(
    parts: Parts, fails: str, closed: list[str]
) -> None:
    parts.fails = fails
    with pytest.raises(StoreUnavailable):
        async with center.open_index_context(SETTINGS, ENCODER):
            raise AssertionError("opened")
    assert parts.done[parts.done.index(fails) + 1 :] == closed


async def test_the_context_has_the_limits_of_the_settings(parts: Parts) -> None:
    topics = SETTINGS.topics.model_copy(update={"tombstone_retention_hours": 30})
    settings = SETTINGS.model_copy(update={"topics": topics})
    async with center.open_index_context(settings, ENCODER) as context:
        assert context.deletions_kept == timedelta(hours=30)
        assert context.config is settings.index and context.max_record_bytes == settings.kafka.max_record_bytes
        assert context.now().tzinfo is UTC and abs(context.now() - datetime.now(UTC)) < timedelta(minutes=1)
    producer = parts.given["producer"]
    assert producer["linger_ms"] == 0 and producer["max_request_size"] > settings.kafka.max_record_bytes
    assert parts.given["index"] == {"encoder_version": "v1", "dim": 8}
    assert parts.given["encoding"] == {
        "prepare_threads": settings.index.prepare_threads,
        "encode_threads": 3,
        "cache_items": settings.index.cache_items,
    }


async def test_a_verification_reads_rows_that_are_on_their_way_too_and_retries_that_are_kept(parts: Parts) -> None:
    before = datetime.now(UTC)
    await center.run_verification(SETTINGS, FOUND, None, center._always_allowed, lambda *_: None)
    assert parts.fetched == [{"pending": True}]
    assert parts.done == ["open log", "open log", "verified", "close log", "close log", "close index"]
    given = parts.given["verification"]
    kept = timedelta(milliseconds=int(TOPICS["items-retry"].extra["retention.ms"]))
    assert kept >= timedelta(days=1) and before <= given["retries_since"] + kept <= datetime.now(UTC)
    assert given["repairer"] is None
    assert given["is_current"]("v1") == (center.collection_name(SETTINGS.milvus.alias, "v1") == FOUND.name)


@pytest.mark.parametrize("there", [True, False])
async def test_a_repair_sets_the_center_up_and_verifies_what_is_there_then(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    looks: list[str] = []

    async def read(_: Any) -> CollectionInfo:
        looks.append(parts.done[-1])
        return CollectionInfo("items_v1", 8, None, is_filled=False)

    monkeypatch.setattr(center, "read_center", read)
    await center.run_verification(SETTINGS, FOUND if there else None, ENCODER, center._always_allowed, lambda *_: None)
    assert looks == ([] if there else ["open fetcher"])
    assert parts.given["verification"]["repairer"] is not None
    assert parts.given["index"] == {"encoder_version": "v1" if there else "reader", "dim": 8}
    assert parts.done[-5:] == ["close index", "close fetcher", "close encoding", "stop producer", "close index"]
