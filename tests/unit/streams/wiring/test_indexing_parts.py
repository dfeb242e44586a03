"""What an index worker does before its first record: topics that fit, a center that may need repair, its slot."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from structlog.testing import capture_logs

from schemas.errors import Misconfigured, StoreUnavailable
from streams.broker.cluster import ClusterTopics
from streams.center.compare import CenterReport, Overdue
from streams.indexing.app import WrongAssignment
from streams.runtime.delivery import BackOffConfig
from streams.settings import Settings
from streams.stores.vectors.collection import CollectionInfo
from streams.wiring import center, indexing
from tests.factories.fake_consumer import FakeRecord
from tests.factories.memory_log import MemoryLog

SETTINGS = Settings()
QUICK = SETTINGS.model_copy(
    update={
        "index": SETTINGS.index.model_copy(update={"back_off": BackOffConfig(initial_seconds=0.001, max_seconds=0.001)})
    }
)


# ---- topics ----------------------------------------------------------------------------------------------------------


def test_a_worker_needs_as_many_partitions_of_retries_as_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def found(retries: int) -> Any:
        partitions = {"items": [0, 1], "items-retry": list(range(retries))}
        return lambda *given: asked.append(given[-1]) or ClusterTopics("c", {}, partitions)

    monkeypatch.setattr(indexing, "describe_topics", found(2))
    indexing._check_topics(SETTINGS)
    assert asked == [("items", "behaviours", "embeddings", "queries", "items-retry", "dead-letters")]
    without = SETTINGS.model_copy(update={"index": SETTINGS.index.model_copy(update={"queries": False})})
    indexing._check_topics(without)
    assert asked[1:] == [("items", "embeddings", "items-retry", "dead-letters")]
    for retries in (1, 3):
        monkeypatch.setattr(indexing, "describe_topics", found(retries))
        with pytest.raises(WrongAssignment, match=rf"mim\.items has 2 partitions and mim\.items-retry has {retries}"):
            indexing._check_topics(SETTINGS)


async def test_retries_that_went_before_a_worker_read_them_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(items_retry=[[FakeRecord(0, 9)], [FakeRecord(1, 4)]])
    log.first = {TopicPartition("mim.items-retry", 0): 9, TopicPartition("mim.items-retry", 1): 4}
    other = TopicPartition("mim.items", 0)
    log.groups["index"] = {TopicPartition("mim.items-retry", 0): 5, TopicPartition("mim.items-retry", 1): 4, other: 0}
    monkeypatch.setattr(indexing, "LogReader", log)
    with capture_logs() as said:
        await indexing._warn_of_lost_retries(SETTINGS)
    assert [(line["event"], line["by_partition"]) for line in said] == [("index.retries_lost", {0: 4})]
    log.groups["index"][TopicPartition("mim.items-retry", 0)] = 9
    with capture_logs() as said:
        await indexing._warn_of_lost_retries(SETTINGS)
    assert said == []


# ---- repair ----------------------------------------------------------------------------------------------------------


class Scene:
    """A center, positions in the log, and a repair that leaves `left` faults."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, filled: bool, overdue: bool, left: int = 0) -> None:
        self.done: list[str] = []
        self.asked: dict[str, Any] = {}
        self.away = 1
        found = CollectionInfo("items_v1", 8, "v1" if filled else None, is_filled=filled)
        encoder, guard = object(), object()

        async def read(_: Any) -> CollectionInfo:
            self.away -= 1
            if self.away >= 0:
                raise StoreUnavailable("Milvus", "away")
            return found

        async def positions(*_: Any, **asked: Any) -> Sequence[Overdue]:
            self.asked = asked
            return [Overdue(0, 3, 9)] * overdue

        async def verify(_: Any, its: Any, made_by: Any, before: Any, __: Any) -> CenterReport:
            assert (its, made_by, before) == (found, encoder, guard)
            self.done.append("repaired")
            return CenterReport(left=left)

        async def mark(_: Any, its: CollectionInfo) -> None:
            assert its == found
            self.done.append("marked")

        async def warn(_: Any) -> None:
            self.done.append("warned")

        for name, stub in (("read_center", read), ("find_overdue", positions), ("run_verification", verify),
                           ("mark_filled", mark), ("_warn_of_lost_retries", warn)):  # fmt: skip
            monkeypatch.setattr(indexing, name, stub)
        self.prepare = lambda: indexing._prepare_center(QUICK, encoder, guard)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("filled", "overdue", "left", "done"),
    [
        (True, False, 0, ["warned"]),
        (True, True, 0, ["warned", "repaired"]),
        (False, False, 0, ["warned", "marked"]),
        (False, True, 0, ["warned", "repaired", "marked"]),
        (False, True, 1, ["warned", "repaired"]),
    ],
)
async def test_a_center_counts_as_filled_only_once_nothing_of_it_is_left_to_repair(
    monkeypatch: pytest.MonkeyPatch, filled: bool, overdue: bool, left: int, done: list[str]
) -> None:
    scene = Scene(monkeypatch, filled=filled, overdue=overdue, left=left)
    with capture_logs() as said:
        await scene.prepare()
    assert scene.done == done
    assert (scene.asked["center_is_empty"], scene.asked["center_is_filled"]) == (not filled, filled)
    forced = [line["reason"] for line in said if line["event"] == "index.verification_forced"]
    assert len(forced) == overdue and all(("deletes are kept" in why) == filled for why in forced)


def test_a_verification_tells_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("streams.wiring.indexing.time.monotonic", lambda: now[0])
    told = indexing._ProgressLog()
    with capture_logs() as said:
        for moment in (0, 29.9, 30, 31, 59.9, 60):
            now[0] = moment
            told("reading", int(moment), 99)
    assert [line["done"] for line in said] == [30, 60]


# ---- slots -----------------------------------------------------------------------------------------------------------


async def test_a_slot_is_claimed_before_it_leaves_the_group_and_released_after(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Slot:
        instance_id = "mim.index-3"

        async def claim(self) -> None:
            done.append("claim")

        async def release(self) -> None:
            done.append("release")

    async def opened(_: Any, name: str, __: Any) -> Any:
        assert name == "3"
        return Slot()

    monkeypatch.setattr(indexing, "_open_slot", opened)
    monkeypatch.setattr(indexing, "remove_member", lambda _, group, member: done.append(f"{group} {member}") or True)
    await indexing.remove_slot(SETTINGS, "3")
    assert done == ["claim", f"{SETTINGS.topics.group('index')} mim.index-3", "release"]


async def test_a_lease_that_is_lost_ends_the_flow_and_one_that_is_given_back_does_not() -> None:
    failed: list[BaseException] = []
    flow: Any = SimpleNamespace(fail=failed.append)

    async def lost() -> None:
        raise StoreUnavailable("Redis", "away")

    for keeping in (asyncio.ensure_future(lost()), asyncio.ensure_future(asyncio.Event().wait())):
        if keeping.get_coro().__name__ == "wait":  # type: ignore[union-attr]
            keeping.cancel()
        await asyncio.wait([keeping])
        indexing._fail_with(flow, keeping)  # type: ignore[arg-type]
    assert [type(error) for error in failed] == [StoreUnavailable]


# ---- the center by command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [True, False])
async def test_only_a_repair_loads_the_encoder(monkeypatch: pytest.MonkeyPatch, repair: bool) -> None:
    given: list[Any] = []

    async def read(_: Any) -> None:
        return None

    async def run(*arguments: Any) -> CenterReport:
        given.append(arguments[1:4])
        return CenterReport()

    monkeypatch.setattr(center, "read_center", read)
    monkeypatch.setattr(center, "_load_encoder", lambda _: "encoder")
    monkeypatch.setattr(center, "run_verification", run)
    await center.verify_center(SETTINGS, repair=repair, on_progress=lambda *_: None)
    assert given == [(None, "encoder" if repair else None, center._always_allowed)]


async def test_nothing_to_verify_is_told_with_what_makes_a_center() -> None:
    with pytest.raises(Misconfigured, match=r"MIM_MILVUS__ALIAS.*--repair"):
        await center.run_verification(SETTINGS, None, None, center._always_allowed, lambda *_: None)


@pytest.mark.parametrize(
    ("cores", "asked", "device", "passes", "threads"),
    [(8, None, "cpu", 8, 1), (8, 2, "cpu", 2, 4), (2, 4, "cpu", 4, 1), (8, None, "cuda", 1, 8), (8, 3, "cuda", 3, 2)],
)
def test_passes_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, asked: int | None, device: str, passes: int, threads: int
) -> None:
    import torch

    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    settings: Any = SimpleNamespace(index=SimpleNamespace(encode_threads=asked), encoder=SimpleNamespace(device=device))
    assert center._share_cores(settings) == passes and set_to == [threads]


def test_records_are_decoded_for_a_repair_as_the_worker_decodes_them() -> None:
    decoding = center._decoding(SETTINGS)
    assert (decoding.max_record_bytes, decoding.field_map) == (
        SETTINGS.kafka.max_record_bytes,
        SETTINGS.index.field_map,
    )
    assert decoding.max_ahead.total_seconds() == SETTINGS.index.max_ahead_seconds
    name = center.collection_name(SETTINGS.milvus.alias, "v1")
    assert center._is_version_of(SETTINGS, name, "v1") and not center._is_version_of(SETTINGS, name, "v2")
