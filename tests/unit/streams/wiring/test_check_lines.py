"""Each line of `mimstream check`: what it looks at, what it says, and which roles it is for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from schemas.errors import BrokerUnavailable, Misconfigured, StoreUnavailable
from streams.broker.partitioning import crc32_partition, home_partition
from streams.commands import check
from streams.settings import Settings
from streams.stores.artifacts.artifact_store import InMemoryArtifactStore
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import ModelRegistry
from streams.stores.vectors.collection import CollectionInfo
from streams.wiring import preflight
from streams.wiring.preflight import CheckLine, _after, _CheckFailed, _line, picture_sizes, run_checks
from streams.wiring.rights import ROLES
from tests.factories.fake_consumer import FakeRecord
from tests.factories.memory_log import MemoryLog
from tests.factories.releases import release
from tests.factories.samples import behaviour

SETTINGS = Settings()


def changed(**sections: dict[str, Any]) -> Settings:
    return SETTINGS.model_copy(
        update={name: getattr(SETTINGS, name).model_copy(update=values) for name, values in sections.items()}
    )


# ---- partitioner ----------------------------------------------------------------------------------------------------

KEYS = [f"k{n}".encode() for n in range(40)]
MURMUR = {key: home_partition(key, 2) for key in KEYS}
CRC = {key: crc32_partition(key, 2) for key in KEYS}


def keyed(homes: dict[bytes, int], *, first: int = 0) -> list[list[FakeRecord]]:
    parts: list[list[FakeRecord]] = [[], []]
    for key, home in homes.items():
        parts[home].append(FakeRecord(home, first + len(parts[home]), key))
    return parts


async def partitioner(monkeypatch: pytest.MonkeyPatch, log: MemoryLog, *names: Any) -> str:
    monkeypatch.setattr(preflight, "LogReader", log)
    return await preflight._partitioner(SETTINGS, names or ("items",))


async def test_keys_may_all_lie_where_one_hash_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(items=keyed(MURMUR), behaviours=keyed(CRC))
    log.topics["items"][0].append(FakeRecord(0, 99, None))  # without a key it says nothing
    assert await partitioner(monkeypatch, log, "items", "behaviours") == (
        "40 of the newest 40 keys of items lie where murmur2 puts them; all 40 of behaviours where CRC32 puts them"
    )
    assert await partitioner(monkeypatch, MemoryLog(items=[[], []])) == (
        "0 of the newest 0 keys of items lie where murmur2 puts them"
    )


async def test_keys_of_two_hashes_are_a_fault_in_either_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = MURMUR | {KEYS[0]: 1 - MURMUR[KEYS[0]]}
    for log in (MemoryLog(items=keyed(mixed), behaviours=keyed(CRC)),
                MemoryLog(items=keyed(CRC), behaviours=keyed(mixed))):  # fmt: skip
        with pytest.raises(_CheckFailed, match="39 of the newest 40 keys of") as caught:
            await partitioner(monkeypatch, log, "items", "behaviours")
        assert "murmur2_random" in caught.value.fix


async def test_only_the_newest_keys_of_each_partition_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_NEWEST_KEYS", 5)
    log = MemoryLog(items=keyed(MURMUR))
    old = FakeRecord(0, 0, next(key for key in KEYS if MURMUR[key] == 1))
    log.topics["items"][0][0] = old
    assert "10 of the newest 10" in await partitioner(monkeypatch, log)
    assert {offset for _, number, offset in log.passed if number == 0} == {
        one.offset for one in log.topics["items"][0][-5:]
    }


# ---- click log ------------------------------------------------------------------------------------------------------


def events(partition: int, *kinds: str | None) -> list[FakeRecord]:
    made = [None if kind is None else behaviour(f"e{n}", kind).model_dump_json() for n, kind in enumerate(kinds)]
    return [FakeRecord(partition, n, b"u1", b"{" if one is None else one.encode()) for n, one in enumerate(made)]


async def click_log(monkeypatch: pytest.MonkeyPatch, *partitions: list[FakeRecord], draws: int = 0) -> str:
    log = MemoryLog(behaviours=partitions)
    log.first[TopicPartition("mim.behaviours", 0)] = partitions[0][0].offset if partitions[0] else 0
    monkeypatch.setattr(preflight, "LogReader", log)
    return await preflight._click_log(changed(trainer={"draw_exposures": draws}))


async def test_a_click_log_is_told_by_kind_over_all_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await click_log(monkeypatch, events(0, "exposure", "click", None), events(1, "click", "exposure"))
    assert found == "the newest events: 2 click, 2 exposure, 1 unreadable"
    assert await click_log(monkeypatch, [], []) == "the newest events: nothing yet"
    assert await click_log(monkeypatch, events(0, None), []) == "the newest events: 1 unreadable"


async def test_takes_alone_fail_unless_exposures_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_CheckFailed, match="newest events are 1 click, 1 purchase: takes and no exposure") as caught:
        await click_log(monkeypatch, events(0, "click"), events(1, "purchase"))
    assert "MIM_TRAINER__DRAW_EXPOSURES" in caught.value.fix
    assert "1 click" in await click_log(monkeypatch, events(0, "click"), [], draws=4)


async def test_the_newest_events_of_each_partition_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_SAMPLE", 4)
    found = await click_log(monkeypatch, events(0, *["click"] * 8, "exposure", "exposure"), events(1, "click"))
    assert found == "the newest events: 1 click, 2 exposure"
    assert "1 exposure" in await click_log(monkeypatch, events(0, "click", "exposure")[1:], events(1, "click"))


# ---- encoder, center, model -----------------------------------------------------------------------------------------


async def test_a_center_fits_the_encoder_or_is_told_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Any = SimpleNamespace(version="v1", dim=8)

    async def judge(name: str, version: str | None, dim: int, *encoders: Any) -> str:
        held = CollectionInfo(name=name, encoder_version=version, dim=dim, is_filled=True)

        async def read(_: Any) -> CollectionInfo:
            return held

        monkeypatch.setattr(preflight, "read_center", read)
        centers: list[CollectionInfo | None] = []
        found = await preflight._center(SETTINGS, list(encoders), centers)
        assert centers == [held]
        return found

    assert "items_v1 (v1, 8-d)" in await judge("items_v1", "v1", 8, ours)
    assert "(empty, 8-d)" in await judge("items_v1", None, 8, ours)
    assert "(v2, 9-d)" in await judge("items_v2", "v2", 9)  # the encoder could not be loaded: a line of its own
    with pytest.raises(_CheckFailed, match="holds 9-d vectors, the encoder makes 8-d"):
        await judge("items_v1", "v1", 9, ours)
    with pytest.raises(_CheckFailed, match="another encoder than v1"):
        await judge("items_v2", "v2", 8, ours)

    async def nothing(_: Any) -> None:
        return None

    monkeypatch.setattr(preflight, "read_center", nothing)
    assert "nothing indexed yet" in await preflight._center(SETTINGS, [ours], [])


class Probed(InMemoryArtifactStore):
    """A store that heeds no conditions, if so told."""

    def __init__(self, *, sound: bool = True) -> None:
        super().__init__()
        self.sound = sound

    def check(self) -> None:
        if not self.sound:
            raise Misconfigured("does not heed the conditions of a put")


async def test_a_release_fits_the_center_and_its_store_can_be_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Probed()
    store = ModelRegistry(artifacts, ModelStoreConfig(), named="memory")
    monkeypatch.setattr(preflight, "open_registry", lambda config: store)
    assert "nothing released" in await preflight._model(SETTINGS, "e1", writes=True)
    name = release(store, 7)
    for expected in ("e1", None):
        assert await preflight._model(SETTINGS, expected, writes=True) == f"{name}, 7 rows trained"
    with pytest.raises(_CheckFailed, match=f"release {name} goes with encoder e1, the center with e2"):
        await preflight._model(SETTINGS, "e2", writes=False)
    release(store, 8, features="0123456789abcdef")
    with pytest.raises(_CheckFailed, match="reads features 0123456789abcdef, these settings compute"):
        await preflight._model(SETTINGS, "e1", writes=False)
    name = release(store, 9)
    artifacts.sound = False
    with pytest.raises(Misconfigured, match="does not heed"):
        await preflight._model(SETTINGS, "e1", writes=True)
    assert await preflight._model(SETTINGS, "e1", writes=False) == f"{name}, 9 rows trained"


@pytest.mark.parametrize(
    ("train", "models", "tried"),
    [
        ({}, {}, ["state", "models"]),
        ({"snapshot_folder": "snapshots"}, {}, ["state", "snapshots", "models"]),
        ({}, {"url": "s3://bucket/x"}, ["state"]),
        ({"snapshot_folder": "snapshots"}, {"url": "s3://bucket/x"}, ["state", "snapshots"]),
    ],
)
async def test_every_folder_that_a_trainer_writes_is_tried(
    tmp_path: Path, train: dict[str, str], models: dict[str, str], tried: list[str]
) -> None:
    settings = changed(
        train={"state_folder": tmp_path / "state"} | {name: tmp_path / folder for name, folder in train.items()},
        models={"folder": tmp_path / "models"} | models,
    )
    found = await preflight._folders(settings)
    assert found.startswith(f"{', '.join(str(tmp_path / name) for name in tried)} can be written")
    for name in tried:
        (tmp_path / name).write_text("no folder")
        with pytest.raises(_CheckFailed, match=f"{name} cannot be written") as caught:
            await preflight._folders(settings)
        assert "--for index,record,serve" in caught.value.fix
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("decoded", "fetched", "record", "state"),
    [(100, 100, 10_000, "ok"), (101, 100, 1_024, "failed"), (100, 100, 1_024, "ok"), (5_000, 100, 1_000_000, "ok")],
)
def test_a_picture_that_is_decoded_must_come_in_some_way(decoded: int, fetched: int, record: int, state: str) -> None:
    settings = changed(
        encoder={"max_image_bytes": decoded}, images={"max_bytes": fetched}, kafka={"max_record_bytes": record}
    )
    line = picture_sizes(settings)
    assert line.state == state and (state == "ok") == (line.fix is None)


# ---- which lines ----------------------------------------------------------------------------------------------------


async def test_what_a_line_finds_and_raises_is_told_with_the_fix() -> None:
    async def fine() -> str:
        return "found"

    async def away() -> str:
        raise BrokerUnavailable("Kafka", "away")

    async def judged() -> str:
        raise _CheckFailed("wrong", "its own fix")

    async def broken() -> str:
        raise RuntimeError("a fault of ours")

    assert await _line("a", fine, "fix") == CheckLine("a", "ok", "found")
    found = await _line("a", away, "fix")
    assert (found.state, found.fix) == ("failed", "fix") and "away" in found.detail
    assert await _line("a", judged, "fix") == CheckLine("a", "failed", "wrong", "its own fix")
    with pytest.raises(RuntimeError):
        await _line("a", broken, "fix")
    for state in ("failed", "unknown"):
        after = await _after(CheckLine("topics", state, "?", "create them"), "click log", fine, "fix")  # type: ignore[arg-type]
        assert (after.name, after.state, after.fix) == ("click log", "unknown", "create them")
    assert (await _after(CheckLine("topics", "ok", "?"), "click log", fine, "fix")).ok


class Stubs:
    """All checks, of which some do not succeed; notes what each was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *wrong: str) -> None:
        self.asked: dict[str, tuple[Any, ...]] = {}
        for name in (
            "broker",
            "topics",
            "partitioner",
            "groups",
            "click_log",
            "redis",
            "view",
            "center",
            "model",
            "folders",
        ):
            monkeypatch.setattr(preflight, f"_{name}", self.stub(name, name in wrong))

    def stub(self, name: str, wrong: bool) -> Any:
        async def check(settings: Settings, *arguments: Any, **named: Any) -> str:
            self.asked[name] = (*arguments, *named.values())
            if name == "center":
                arguments[1].append(CollectionInfo(name="c", encoder_version="held", dim=8, is_filled=True))
            if wrong:
                raise StoreUnavailable(name, "away")
            return name

        return check

    async def lines(self, *roles: Any) -> list[str]:
        found = await run_checks(SETTINGS, lambda: SimpleNamespace(version="made", dim=8), roles or ROLES)  # type: ignore[arg-type, return-value]
        return [line.name + ("" if line.ok else f" {line.state}") for line in found]


BROKER = ["broker", "topics", "partitioner"]
GROUPS = [*BROKER, "groups"]
EVERYTHING = [*GROUPS, "click log", "redis", "behaviour view", "pictures", "encoder", "milvus", "model", "folders"]


@pytest.mark.parametrize(
    ("roles", "lines", "written"),
    [
        (ROLES, EVERYTHING, ["items", "behaviours"]),
        (["index"], [*GROUPS, "redis", "behaviour view", "pictures", "encoder", "milvus"], ["items", "behaviours"]),
        (["record"], [*GROUPS, "redis", "behaviour view", "pictures"], ["items", "behaviours"]),
        (["train"], [*GROUPS, "click log", "pictures", "model", "folders"], ["behaviours"]),
        (["serve"], ["broker", "topics", "redis", "behaviour view", "pictures", "encoder", "milvus", "model"], None),
    ],
    ids=["all", "index", "record", "train", "serve"],
)
async def test_a_role_has_the_lines_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, roles: list[Any], lines: list[str], written: list[str] | None
) -> None:
    stubs = Stubs(monkeypatch)
    assert await stubs.lines(*roles) == lines
    assert stubs.asked.get("partitioner") == (None if written is None else (written,))
    if "model" in lines:
        assert stubs.asked["model"] == ("held" if "milvus" in lines else None, "train" in roles)


async def test_what_depends_on_a_line_that_fails_is_left_out_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    after_topics = [*EVERYTHING]
    after_topics[1:5] = ["topics failed", "partitioner unknown", "groups", "click log unknown"]
    assert await Stubs(monkeypatch, "topics").lines() == after_topics
    rest = ["pictures", "encoder", "milvus", "model", "folders"]
    assert await Stubs(monkeypatch, "broker").lines() == ["broker failed", "redis", *rest]
    assert await Stubs(monkeypatch, "redis").lines() == [*GROUPS, "click log", "redis failed", *rest]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "status"), [(["ok"], 0), (["ok", "unknown"], 6), (["unknown", "failed"], 1), (["failed"], 1), ([], 0)]
)
def test_the_command_prints_its_lines_and_ends_with_what_they_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: list[Any], status: int
) -> None:
    lines = [CheckLine(f"n{n}", state, "found this", "do that") for n, state in enumerate(states)]
    asked: list[Any] = []

    async def checks(settings: Settings, load: Any, roles: Any) -> list[CheckLine]:
        asked.append(roles)
        return lines

    monkeypatch.setattr(check, "run_checks", checks)
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    assert check.run(parser.parse_args(["--json", "--for", "train, index"]), SETTINGS) == status
    told = json.loads(capsys.readouterr().out)
    assert [(line["ok"], line["state"], line["detail"]) for line in told] == [
        (state == "ok", state, "found this") for state in states
    ]
    assert check.run(parser.parse_args([]), SETTINGS) == status
    shown = capsys.readouterr().out
    assert all(state.replace("failed", "FAILED") in shown for state in states)
    assert asked == [["index", "train"], list(ROLES)]
    with pytest.raises(SystemExit):
        parser.parse_args(["--for", "nobody"])


def test_rights_are_shown_without_a_connection(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    assert check.run(parser.parse_args(["--rights", "--json"]), SETTINGS) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 10 and all(len(row) == len(rows[0]) for row in rows)
    assert check.run(parser.parse_args(["--rights"]), SETTINGS) == 0
    assert "Redis, for read and write: DEL" in capsys.readouterr().out
