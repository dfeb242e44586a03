"""What the demo counts from outside, waits for, shows and ends with."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from encoders.base import ItemContent
from encoders.hashing import HashingEncoder
from schemas.errors import Misconfigured, Reason, Unavailable
from schemas.items import embedding_key
from schemas.letters import DeadLetter
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.commands import demo as command
from streams.demo import audit, run
from streams.demo.audit import Letters, announced_items, compare_with_fresh, read_letters
from streams.demo.outcome import MIN_SAMPLE_COSINE, DemoResult
from streams.demo.sample_items import live_items, with_picture
from streams.settings import Settings
from tests.factories.demo import make_result
from tests.factories.fake_consumer import FakeRecord
from tests.factories.memory_log import MemoryLog
from tests.factories.offline_folders import START, write
from trainer.datasets.folder import DataSet, open_data_set


class Topics(MemoryLog):
    """A log that can be read topic by topic."""

    async def read_topic(self, name: str) -> Any:
        for records in self.topics[name]:
            for record in records:
                yield record


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    folder, ids = tmp_path / "set", ["i1", "i2", "i3"]
    write(folder, "items", item_id=ids, title=["one", "two", "three"], publish_ts=[START + n for n in range(3)])
    write(folder, "images", item_id=["i3"], image=[b"\x89PNG picture"])
    return open_data_set(folder, behaviours=False)


# ---- audit -----------------------------------------------------------------------------------------------------------


async def test_an_item_is_announced_if_its_newest_announcement_is_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    key = {name: embedding_key("v", name) for name in "abc"}
    records = [("a", b"1"), ("b", b"1"), ("a", None), ("c", None), ("c", b"1"), ("b", b"2"), ("b", None)]
    monkeypatch.setattr(
        audit, "LogReader", Topics(embeddings=[[FakeRecord(0, n, key[k], v) for n, (k, v) in enumerate(records)]])
    )
    assert await announced_items(BrokerConfig(), TopicsConfig()) == {"c"}


async def test_the_newest_letter_of_each_record_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    letters = [
        DeadLetter("items", 0, 1, b"a", b"{", "decode", Reason.NO_KEY, "first", now),
        DeadLetter("items", 0, 1, b"a", b"{", "decode", Reason.NOT_JSON, "again", now),
        DeadLetter("behaviours", 0, 1, b"u", b"{", "record", Reason.NOT_JSON, "why", now),
    ]
    records = [
        FakeRecord(0, n, one.letter_key, one.value, headers=tuple(one.headers())) for n, one in enumerate(letters)
    ]
    monkeypatch.setattr(audit, "LogReader", Topics(dead_letters=[records]))
    broken = {("items", 0, 1): Reason.NOT_JSON, ("behaviours", 0, 1): Reason.NOT_JSON}
    found = await read_letters(BrokerConfig(), TopicsConfig(), broken, set())
    assert (found.items, found.behaviours, found.missing, found.unexpected) == (1, 1, [], [])
    assert found.by_reason == {"behaviours not_json": 1, "items not_json": 1}


@pytest.mark.parametrize(
    ("held", "smallest"), [("all", 1.0), ("one turned", 0.0), ("one absent", -1.0), ("bare", -1.0)]
)
async def test_held_vectors_are_compared_with_fresh_ones(data: DataSet, held: str, smallest: float) -> None:
    encoder = HashingEncoder(8)

    class Api:
        async def item(self, item_id: str) -> Any:
            title = {"i1": "one", "i2": "two", "i3": "three"}[item_id]
            vector = encoder.encode([encoder.prepare(ItemContent(item_id, title))])[0]
            if item_id == "i2":
                if held == "one absent":
                    return None
                vector = np.roll(vector, 1) * 0 if held == "one turned" else vector
                vector = None if held == "bare" else vector
            return SimpleNamespace(vector=None if vector is None else vector.tolist())

    api: Any = Api()
    assert await compare_with_fresh(api, encoder, data, [0, 1]) == pytest.approx(smallest, abs=1e-6)
    assert await compare_with_fresh(api, encoder, data, [0]) == pytest.approx(1.0, abs=1e-6)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_live_items_are_the_newest_under_other_ids_and_titles(data: DataSet) -> None:
    made = [(item_id, json.loads(payload)) for item_id, payload in live_items(data, 2)]
    assert [item_id for item_id, _ in made] == ["mimstream-demo-0", "mimstream-demo-1"]
    assert [item["title"] for _, item in made] == ["two (0)", "three (1)"]
    assert all(item["item_id"] == item_id for item_id, item in made) and "image" in made[1][1]
    assert len(live_items(data, 99)) == 3


def test_items_with_a_picture_are_shown_first_and_no_more_than_asked_for(data: DataSet) -> None:
    assert [one.item_id for one in with_picture(data, ["i1", "i2", "i3"], 1, seed=0)] == ["i3"]
    assert len(with_picture(data, ["i1", "i2"], 5, seed=0)) == 2 and with_picture(data, [], 5, seed=0) == []
    assert with_picture(data, data.item_ids, 2, seed=3) == with_picture(data, data.item_ids, 2, seed=3)


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_a_run_makes_about_eight_releases_of_two_thousand_rows_at_least() -> None:
    def behaviours(exposures: int, takes: int) -> Any:
        return SimpleNamespace(is_take=np.array([False] * exposures + [True] * takes))

    assert run._release_every(behaviours(80_000, 9)) == 10_000
    assert run._release_every(behaviours(100, 90_000)) == 2_000


def test_the_processes_of_a_run_keep_to_its_folder_and_its_machine(tmp_path: Path) -> None:
    stack: Any = SimpleNamespace(endpoints={"kafka": {"bootstrap_servers": "x"}})
    values = run._values(stack, tmp_path, 7, 4_000)
    assert values["models"]["folder"] == tmp_path / "models" and values["models"]["url"] is None
    assert (
        values["train"]["state_folder"] == tmp_path / "train" and values["train"]["variants"].split(",")[0] == "ciubm"
    )
    assert (
        values["serve"] == {"host": "127.0.0.1", "port": 7, "tokens": []}
        and values["kafka"] == stack.endpoints["kafka"]
    )
    assert values["trainer"]["release_every_rows"] == 4_000 and values["gate"]["trial_rows"] == 2_000


class Draining:
    """A run that waits until everything was read, half a second a look, while `reports` come one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        options: Any = SimpleNamespace()
        settings: Any = SimpleNamespace()
        console: Any = None
        self.run = run._Run(options, settings, {}, tmp_path, console)
        self.now = 0.0
        self.looks: list[Any] = []
        self.received, self.waiting = 5, 0
        self.run._progress.items_indexed, self.run._progress.behaviours_recorded = 3, 5
        self.run._children = {role: SimpleNamespace(tail=lambda role=role: f"end of {role}") for role in run.ROLES}  # type: ignore[misc]

        async def sleep(seconds: float) -> None:
            self.now += seconds
            self.look()

        monkeypatch.setattr("streams.demo.run.time.monotonic", lambda: self.now)
        monkeypatch.setattr(run, "asyncio", SimpleNamespace(sleep=sleep))
        monkeypatch.setattr(
            self.run, "_trainer_report", lambda: {"accounts": {"received": self.received}, "waiting_for": self.waiting}
        )

    def look(self) -> None: ...

    async def drained(self) -> float:
        sent: Any = SimpleNamespace(items=3, behaviours=5)
        await self.run._drained(sent)
        return self.now


async def test_it_is_over_once_everything_was_read_and_has_been_quiet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scene = Draining(monkeypatch, tmp_path)
    scene.received = 4

    def look() -> None:
        if scene.now == 20:
            scene.received = 5

    scene.look = look  # type: ignore[method-assign]
    assert await scene.drained() == 20 + run.QUIET_SECONDS + 0.5


@pytest.mark.parametrize(
    ("behind", "role"), [("items", "index"), ("records", "record"), ("rows", "train"), ("waiting", "train")]
)
async def test_what_hangs_is_named_with_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, behind: str, role: str
) -> None:
    scene = Draining(monkeypatch, tmp_path)
    progress = scene.run._progress
    if behind == "items":
        progress.items_indexed = 2
    elif behind == "records":
        progress.behaviours_recorded = 4
    elif behind == "rows":
        scene.received = 4
    else:
        scene.waiting = 1
    with pytest.raises(Unavailable, match=rf"mimstream {role}[\s\S]*end of {role}"):
        await scene.drained()
    assert scene.now == run.STUCK_SECONDS + 0.5


def test_before_its_first_report_a_trainer_has_received_nothing(tmp_path: Path) -> None:
    nothing: Any = None
    made = run._Run(nothing, nothing, {}, tmp_path, nothing)
    assert made._trainer_report()["accounts"]["received"] == 0
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "accounts.json").write_text('{"accounts": {"received": 7}}')
    assert made._trainer_report() == {"accounts": {"received": 7}}


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_a_cosine_at_the_bound_is_good_and_figures_of_nothing_are_none() -> None:
    assert make_result(sample_cosine=MIN_SAMPLE_COSINE).broken_promises() == []
    assert make_result(indexing_seconds=0.0).items_per_second == 0.0
    letters = Letters(2, 6, {}, 8, [f"m{n}" for n in range(9)], [f"u{n}" for n in range(9)])
    assert len(make_result(letters=letters).broken_promises()) == 10


def test_gauc_over_time_has_a_point_for_each_part_that_is_large_enough() -> None:
    points = make_result().gauc_over_time(12)
    assert len(points) == 12 and [at for at, _ in points] == sorted(at for at, _ in points)
    assert all(figures["ciubm"] > figures["din"] for _, figures in points)
    assert make_result().gauc_over_time(60) == [] and make_result(scored=None).gauc_over_time() == []


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "status"), [(10, 0), (9, 1)])
def test_a_demo_that_does_not_add_up_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: DataSet, found: int,
    status: int,
) -> None:  # fmt: skip
    given: list[Any] = []

    def run_demo(options: Any, settings: Settings, folder: Path, console: Any) -> DemoResult:
        given.append((options, folder))
        assert folder.is_dir()
        return replace(make_result(), items_searchable=found)

    monkeypatch.setattr(run, "run_demo", run_demo)
    monkeypatch.setattr("streams.commands.demo.signal.signal", lambda *_: None)
    monkeypatch.setattr(command, "behaviours_of", lambda _, **drawn: drawn)
    monkeypatch.setattr(command, "open_data_set", lambda folder, **_: data)
    monkeypatch.setattr(command, "open_packaged", lambda: data)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def call(*flags: str) -> int:
        options = parser.parse_args([*flags, "--report", str(tmp_path / "r.html")])
        options.config = None
        return command.run(options, Settings())

    assert call("--json") == call("--data", "d", "--events", "9", "--seed", "4", "--requests", "2") == status
    out, err = capsys.readouterr()
    assert ("does not add up: 10 items were encoded, but 9 can be found" in err) == bool(status)
    assert json.loads(out.splitlines()[0])["broken_promises"] == make_result(items_searchable=found).broken_promises()
    assert (tmp_path / "r.html").exists() and not any(folder.exists() for _, folder in given)
    (packaged, _), (own, _) = given
    assert packaged.behaviours == {"seed": 0, "events": command.DEFAULT_EVENTS, "retakes": True}
    assert own.behaviours == {"seed": 4, "events": 9, "retakes": True} and own.requests_per_second == 2
    assert (packaged.broken_share, own.seed) == (0.01, 4) and "title cards" in packaged.pictures
    assert own.pictures == "those of the data set."
    nowhere = parser.parse_args(["--report", str(tmp_path / "nowhere" / "r.html")])
    with pytest.raises(Misconfigured, match="--report"):
        command.run(nowhere, Settings())
