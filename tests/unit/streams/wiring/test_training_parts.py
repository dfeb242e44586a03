"""What `mimstream train` puts together: where it begins and ends, what it keeps, and what only a leader has."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import Misconfigured
from schemas.manifests import Fence
from streams.broker.cluster import ClusterTopics
from streams.monitoring.metrics import Metrics
from streams.settings import Settings
from streams.stores.artifacts.registry import in_memory_registry
from streams.wiring import training
from streams.wiring.offsets_file import read_offsets
from streams.wiring.training import TrainOptions, training_folder
from tests.factories.checkpoints import LOG
from tests.factories.releases import make_manifest
from tests.factories.samples import DIM

RUN: dict[str, Any] = {"until_end": False, "release": True, "write_state": True}


def changed(folder: Path, **sections: dict[str, Any]) -> Settings:
    settings = Settings()
    sections.setdefault("models", {}).setdefault("folder", folder / "models")
    sections.setdefault("train", {}).setdefault("state_folder", folder / "state")
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    )


# ---- offsets in a file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held",
    [
        {"behaviours": {"0": 1200, "1": 1170}},
        {"offsets": {"behaviours": {"0": 1200, "1": 1170}, "embeddings": {"0": 9}}, "steps": 3},
        json.loads(make_manifest(1, offsets={"behaviours": {0: 1200, 1: 1170}}).model_dump_json()),
    ],
    ids=["plain", "report", "manifest"],
)
def test_a_run_begins_anew_at_the_clicks_of_a_file_and_reads_all_vectors(tmp_path: Path, held: Any) -> None:
    file = tmp_path / "offsets.json"
    file.write_text(json.dumps(held))
    assert read_offsets(file) == {"behaviours": {0: 1200, 1: 1170}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"behaviours": [1]}', '{"behaviours": {"a": 1}}', '{"offsets": 1}'])
def test_a_file_without_offsets_is_told_with_what_it_should_be_like(tmp_path: Path, text: str) -> None:
    file = tmp_path / "offsets.json"
    with pytest.raises(Misconfigured, match="does not exist"):
        read_offsets(file)
    file.write_text(text)
    with pytest.raises(Misconfigured, match=r"offsets\.json \(--from-offsets\) is not like"):
        read_offsets(file)
    with pytest.raises(Misconfigured, match="is not like"):
        read_offsets(tmp_path)


# ---- event times -----------------------------------------------------------------------------------------------------

FROM, UNTIL = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("wished", "asked", "span"),
    [
        ({}, [], (None, None)),
        ({"from_time": FROM}, [FROM], ({"behaviours": {0: 1}}, None)),
        ({"until": UNTIL}, [UNTIL], (None, {0: 2})),
        ({"from_time": FROM, "until": UNTIL}, [FROM, UNTIL], ({"behaviours": {0: 1}}, {0: 2})),
        ({"from_offsets": {0: 5}}, [], ({"behaviours": {0: 5}}, None)),
        ({"from_offsets": {0: 5}, "until": UNTIL}, [UNTIL], ({"behaviours": {0: 5}}, {0: 2})),
    ],
)
async def test_a_span_is_looked_up_by_event_time_or_begins_at_given_offsets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wished: dict[str, Any], asked: list[datetime], span: Any
) -> None:
    moments: list[datetime] = []
    kept: list[Path] = []

    class Finder:
        def __init__(self, *_: Any, file: Path, log_now: ClusterTopics, **more: Any) -> None:
            assert log_now is LOG
            kept.append(file)

        async def reached(self, *given: datetime) -> list[dict[int, int]]:
            moments.extend(given)
            return [{0: 1 if moment == FROM else 2} for moment in given]

    monkeypatch.setattr(training, "EventTimeFinder", Finder)
    if "from_offsets" in wished:
        file = tmp_path / "offsets.json"
        file.write_text(json.dumps({"behaviours": wished["from_offsets"]}))
        wished = wished | {"from_offsets": file}
    settings = changed(tmp_path)
    assert await training._span(settings, TrainOptions(**RUN, **wished), LOG) == span
    assert moments == asked and kept == [tmp_path / "models" / "training" / "event-times.json"] * bool(asked)


# ---- folders, scores, variants ---------------------------------------------------------------------------------------


def test_snapshots_lie_beside_the_models_unless_a_folder_is_named(tmp_path: Path) -> None:
    assert training_folder(changed(tmp_path)) == tmp_path / "models" / "training"
    assert training_folder(changed(tmp_path, train={"snapshot_folder": tmp_path / "s"})) == tmp_path / "s"


def test_snapshots_states_and_comparisons_are_made_as_the_settings_say(tmp_path: Path) -> None:
    train = {"keep_snapshots": 7, "snapshot_every_events": 1_234, "skew_limit": 0.25, "skew_every_seconds": 9.0}
    settings = changed(tmp_path, train=train)
    checkpointer = training._make_checkpointer(settings, None)
    assert (checkpointer._every_events, checkpointer._store._keep, checkpointer._fence) == (1_234, 7, None)
    given: Any = None
    log = ClusterTopics("c", {"behaviours": "b"}, {"behaviours": [0]})
    states = training._make_states(settings, given, given, log, Metrics("train"))
    skew = states._skew
    assert (skew._limit, skew._timer._seconds, skew._topic) == (0.25, 9.0, settings.topics.full_name("skew"))
    assert (states._topic, states._writer._log) == (settings.topics.full_name("item-states"), "b")


def test_all_scores_are_kept_where_a_folder_is_named_and_else_the_newest_of_a_run_that_writes_state(
    tmp_path: Path,
) -> None:
    settings = changed(tmp_path, train={"score_files": 7})

    def files(**more: Any) -> tuple[Path, int | None] | None:
        made = training._score_files(settings, TrainOptions(**(RUN | more)))
        return None if made is None else (made._folder, made._keep_files)

    assert files() == (tmp_path / "state" / "scores", 7)
    assert (
        files(scores=tmp_path / "mine")
        == files(scores=tmp_path / "mine", write_state=False)
        == (tmp_path / "mine", None)
    )
    assert files(write_state=False) is None


def test_tombstones_count_as_gone_once_they_may_have_been_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = changed(tmp_path, topics={"tombstone_retention_hours": 3})
    monkeypatch.setattr("streams.wiring.training.time.time", lambda: FROM.timestamp())
    assert not training._tombstones_gone(settings, FROM - timedelta(hours=2, minutes=59))
    assert training._tombstones_gone(settings, FROM - timedelta(hours=3))


def test_variants_are_named_with_commas_and_an_unknown_one_by_its_setting(tmp_path: Path) -> None:
    made = training.trainer_maker(changed(tmp_path, train={"variants": " ciubm, din ,"}))("e", DIM, [0, 1])
    assert list(made._variants._learners) == ["ciubm", "din"]
    assert (made.encoder_version, made.catalogue.dim) == ("e", DIM)
    with pytest.raises(Misconfigured, match=r"MIM_TRAIN__VARIANTS \(--variants\)"):
        training.trainer_maker(changed(tmp_path, train={"variants": "ciubm,dinn"}))("e", DIM, [0])


# ---- one run ---------------------------------------------------------------------------------------------------------


class Wired(Exception):
    """The loop would begin here."""


class Scene:
    """Everything around `_train` but its loop; `reads`, `thread` and `loop` are what their classes were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, snapshot_age: timedelta | None = None) -> None:
        self.settings = changed(folder)
        self.given: dict[str, dict[str, Any]] = {}
        self.loaded: list[Any] = []
        self.claims = 0
        now = datetime.now(UTC)
        offsets = {"behaviours": {0: 7}, "embeddings": {0: 3}}
        age = snapshot_age
        meta = None if age is None else SimpleNamespace(offsets=offsets, created_at=now - age, encoder_version="kept")
        self.found = None if meta is None else SimpleNamespace(meta=meta)

        def note(name: str) -> Any:
            def make(*positional: Any, **named: Any) -> Any:
                self.given[name] = named | {"positional": positional}
                return self

            return make

        def load(snapshot: str | None = None, *, anew: bool = False) -> Any:
            self.loaded.append((snapshot, anew))
            return None if anew else self.found

        async def claim(leads: Any, *_: Any) -> Fence:
            self.claims += 1
            leads.fence = Fence(producer_id=1, epoch=2, term=3)
            return leads.fence

        for name in ("TrainingInput", "TrainerThread", "TrainingLoop", "TrainReports", "ReleaseScheduler"):
            monkeypatch.setattr(training, name, note(name))
        monkeypatch.setattr(training, "describe_log", lambda _: LOG)
        monkeypatch.setattr(training, "open_registry", lambda _: in_memory_registry())
        monkeypatch.setattr(training, "claim_term", claim)
        monkeypatch.setattr(training.Checkpointer, "load", lambda _, *given, **named: load(*given, **named))
        self.scored = SimpleNamespace(extend=lambda rows: None)

    to_forget = committed_offsets = None

    async def run(self, stop: asyncio.Event, found: Any) -> None:
        assert found is (None if self.loaded in ([], [(None, True)]) else self.found)
        stop.set()

    async def train(self, *, leads: bool = True, **options: Any) -> None:
        leadership: Any = SimpleNamespace(fence=Fence(producer_id=1, epoch=2)) if leads else None
        run = TrainOptions(**(RUN | {"release": leads} | options))
        made: Any = object()
        assert await training._train(self.settings, run, made, Metrics("train"), asyncio.Event(), leadership) is None
        assert self.given["TrainerThread"]["positional"][1] is made

    @property
    def reads(self) -> dict[str, Any]:
        return self.given["TrainingInput"]


async def test_a_leader_claims_its_term_goes_on_from_its_snapshot_and_commits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scene = Scene(monkeypatch, tmp_path, snapshot_age=timedelta(hours=1))
    await scene.train()
    assert scene.claims == 1 and scene.loaded == [(None, False)]
    assert scene.reads["start_at"] == {"behaviours": {0: 7}, "embeddings": {0: 3}}
    assert (scene.reads["encoder_version"], scene.reads["bounded"], scene.reads["end_at"]) == ("kept", False, None)
    loop = scene.given["TrainingLoop"]
    assert loop["checkpointer"]._fence == Fence(producer_id=1, epoch=2, term=3)
    assert None not in (loop["releases"], loop["commits"], loop["follower"])
    assert scene.given["TrainerThread"]["reread_embeddings"] is False
    releases = scene.given["ReleaseScheduler"]
    assert releases["every"] is None and not releases["until_end"] and releases["checkpointer"] is loop["checkpointer"]
    assert scene.given["TrainReports"]["folder"] == tmp_path / "state"


async def test_vectors_are_read_again_from_the_beginning_where_deletes_may_be_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hours = Settings().topics.tombstone_retention_hours
    scene = Scene(monkeypatch, tmp_path, snapshot_age=timedelta(hours=hours))
    await scene.train()
    assert scene.reads["start_at"] == {"behaviours": {0: 7}}
    assert scene.given["TrainerThread"]["reread_embeddings"] is True


@pytest.mark.parametrize("queries", [False, True])
async def test_queries_are_read_where_rows_see_them_and_where_the_checkpoint_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, queries: bool
) -> None:
    described: list[Any] = []
    monkeypatch.setattr(training, "describe_topics", lambda *given: described.append(given[-1]) or LOG)
    features = Settings().trainer.features.model_copy(update={"queries": queries})
    for age, start in (
        (timedelta(hours=1), {"behaviours": {0: 7}, "embeddings": {0: 3}, "queries": {0: 2}}),
        (timedelta(days=30), {"behaviours": {0: 7}}),  # all vectors are read again
    ):
        scene = Scene(monkeypatch, tmp_path, snapshot_age=age)
        assert scene.found is not None
        scene.found.meta.offsets["queries"] = {0: 2}
        scene.settings = changed(tmp_path, trainer={"features": features})
        await scene.train()
        assert (scene.reads["queries"], scene.reads["start_at"]) == (queries, start)
        scene.given["TrainingLoop"]["checkpointer"]._read_log()
    assert described == [("embeddings", "behaviours", *(["queries"] if queries else []))] * 2


async def test_a_run_that_releases_nothing_claims_commits_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scene = Scene(monkeypatch, tmp_path, snapshot_age=timedelta(hours=1))
    scene.settings = changed(tmp_path, train={"encoder_version": "mine"})
    await scene.train(leads=False, write_state=False, until_end=True)
    assert scene.claims == 0 and scene.loaded == [] and scene.reads["start_at"] is None
    assert (scene.reads["encoder_version"], scene.reads["bounded"]) == ("mine", True)
    loop = scene.given["TrainingLoop"]
    assert (loop["checkpointer"], loop["releases"], loop["commits"]) == (None, None, None)
    assert (scene.given["TrainReports"]["folder"], scene.given["TrainReports"]["scores"]) == (None, None)
    await scene.train(leads=False, from_snapshot="n1")
    assert scene.loaded == [("n1", False)] and scene.reads["start_at"]["behaviours"] == {0: 7}


async def test_a_run_that_begins_anew_leaves_the_snapshots_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "offsets.json"
    file.write_text('{"behaviours": {"0": 5}}')
    scene = Scene(monkeypatch, tmp_path, snapshot_age=timedelta(hours=1))
    scene.settings = changed(tmp_path, train={"release_every_seconds": 60.0})
    await scene.train(from_offsets=file, until_end=True, replace=True)
    assert scene.loaded == [(None, True)] and scene.reads["start_at"] == {"behaviours": {0: 5}}
    releases = scene.given["ReleaseScheduler"]
    assert releases["every"] is not None and releases["until_end"]
    assert releases["positional"][1]._replace is True


async def test_a_store_on_s3_without_its_package_is_told_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def require(module: str, needed_by: str) -> None:
        asked.append(module)
        raise Misconfigured(needed_by)

    monkeypatch.setattr(training, "require_package", require)
    monkeypatch.setattr(training, "trainer_maker", lambda _: None)
    with pytest.raises(Misconfigured, match="MIM_MODELS__URL"):
        await training.train(changed(tmp_path, models={"url": "s3://bucket/x"}), TrainOptions(**RUN))
    assert asked == ["s3fs"]
