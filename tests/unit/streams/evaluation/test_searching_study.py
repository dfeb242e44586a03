"""Studies of a folder with searches: read or not, never one for the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams import cli
from streams.evaluation.study import Study
from streams.settings import Settings, load_settings
from streams.wiring.encoder_training import open_study, study_folder
from streams.wiring.simulation import Simulation, open_simulation
from tests.factories.offline_folders import write_days
from tests.factories.searching_folders import write_searching
from trainer.datasets.folder import open_data_set
from trainer.features.config import FeatureConfig
from trainer.samples.searches import QUERY_COLUMNS

GIVEN: dict[str, Any] = {"protocol_name": "time-split", "labels": "takes", "vectors": "frozen", "neg_type": "pop"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_searching(tmp_path_factory.mktemp("here") / "set", users=300, items=40, takes=2_500)


def test_a_study_that_reads_searches_is_not_resumed_without_them_nor_the_other_way_round(
    folder: Path, tmp_path: Path
) -> None:
    settings = load_settings()
    read = open_study(settings, folder, **GIVEN, queries="auto", out=tmp_path / "read")
    unread = open_study(settings, folder, **GIVEN, queries="off", out=tmp_path / "unread")
    assert read.recorded.rows.dense_names[-len(QUERY_COLUMNS) :] == QUERY_COLUMNS
    assert unread.recorded.rows.dense_names == FeatureConfig().names and unread.recorded.rows.trigger_N is None
    for out, queries in ((read.out, "off"), (unread.out, "auto")):
        with pytest.raises(Misconfigured, match="queries"):
            open_study(settings, folder, **GIVEN, queries=queries, out=out)  # type: ignore[arg-type]
    about = json.loads((unread.out / "study.json").read_text())
    assert about.pop("queries") == "off" and json.loads((read.out / "study.json").read_text())["queries"] == "auto"
    (unread.out / "study.json").write_text(json.dumps(about))  # as it was written when no study read searches
    open_study(settings, folder, **GIVEN, queries="off", out=unread.out)


def test_the_setting_that_switches_searches_off_does_so_in_studies_too(folder: Path, tmp_path: Path) -> None:
    settings = load_settings(given=["MIM_TRAINER__FEATURES__QUERIES=false"])
    study = open_study(settings, folder, **GIVEN, queries="auto", out=tmp_path)
    assert not study.recorded.reads_searches and study.recorded.rows.dense_names == FeatureConfig().names


@pytest.mark.parametrize("column", ["query_N", "trigger_N"])
def test_a_folder_in_which_rows_see_something_else_is_another_study(column: str, folder: Path, tmp_path: Path) -> None:
    study = open_study(load_settings(), folder, **GIVEN, queries="auto", out=tmp_path)
    recorded = study.recorded
    changed = replace(recorded, rows=replace(recorded.rows, **{column: getattr(recorded.rows, column)[::-1]}))
    encoder = json.loads((tmp_path / "study.json").read_text())["encoder"]
    with pytest.raises(Misconfigured, match="other impressions"):
        Study(changed, study.protocol, study._make_versions, study.kind, tmp_path, encoder=encoder)
    Study(recorded, study.protocol, study._make_versions, study.kind, tmp_path, encoder=encoder)


def test_a_folder_without_searches_has_one_study_whatever_is_asked_for(tmp_path: Path) -> None:
    settings, plain = load_settings(), write_days(tmp_path / "days")
    for queries in ("auto", "off"):
        study = open_study(settings, plain, **GIVEN, queries=queries, out=tmp_path / "out")  # type: ignore[arg-type]
        assert study.recorded.rows.query_N is None and study.recorded.rows.dense_names == FeatureConfig().names
    data = open_data_set(plain)
    assert study_folder(settings, data, "cold", "csft").name == "days-cold-csft"


@pytest.mark.parametrize("queries", ["auto", "off"])
def test_the_command_says_what_was_read(
    queries: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("MIM_ENCODERS__CACHE_FOLDER", str(tmp_path / "cache"))
    models = "popularity,content-knn" + (",tfidf-query" if queries == "auto" else "")
    arguments = ["evaluate", str(folder), "--models", models, "--seeds", "1", "--vectors", "frozen", "--json"]
    assert cli.main(["--log-level", "error", *arguments, "--queries", queries]) == 0
    document = json.loads(capsys.readouterr().out)
    out = Path(document["out"])
    assert out.name == "set-time-split-frozen" + ("-searches" if queries == "auto" else "")
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert ("(5 distinct queries, " in text) == (queries == "auto")
        assert ("searches and trigger items are not read" in text) == (queries == "off")
    searches = document["about"]["searches"]
    if queries == "off":
        assert searches is None
        return
    assert 0.6 < searches["rows_with_query"] < 0.9 and 0.6 < searches["rows_with_trigger"] < 0.75
    assert {"tfidf-query"} < {row["model"] for row in document["means"]}


def simulation_of(folder: Path, settings: Settings, queries: Any, vectors: Any = "bundle") -> Simulation:
    return open_simulation(
        settings, folder, neg_type="pop", seed=0, takes=None, limit=None, broken=0.0, vectors=vectors, queries=queries
    )


def test_a_live_run_reads_searches_unless_it_is_told_not_to(folder: Path, tmp_path: Path) -> None:
    settings = load_settings()
    unset = settings.model_copy(
        update={"trainer": settings.trainer.model_copy(update={"features": FeatureConfig(queries=False)})}
    )
    read, kept, off = (
        simulation_of(folder, one, queries) for one, queries in ((settings, "auto"), (unset, "auto"), (settings, "off"))
    )
    assert [one._settings.trainer.features.queries for one in (read, kept, off)] == [True, False, False]
    assert [bool((one.behaviours.search >= 0).any()) for one in (read, kept, off)] == [True, True, False]
    assert [bool((one.behaviours.trigger >= 0).any()) for one in (read, kept, off)] == [True, True, False]
    plain = simulation_of(write_days(tmp_path / "days"), settings, "auto")
    assert plain._settings is settings


def test_vectors_of_a_live_run_are_those_of_items_and_queries(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_ENCODERS__CACHE_FOLDER", str(tmp_path / "cache"))
    settings = load_settings()
    for queries, more in (("auto", 4), ("off", 0)):  # a photo of one of the five cannot be read
        for records in simulation_of(folder, settings, queries, "frozen").embeddings(0).values():
            names = [record.item_id for record in records]
            assert len(names) == len(set(names)) == 40 + more
