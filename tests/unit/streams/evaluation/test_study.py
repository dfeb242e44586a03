"""A study is resumed, tuned on the validation span alone, and reported as it was scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.fusion_config import FusionConfig
from schemas.errors import Misconfigured
from streams import cli
from streams.evaluation.figures import figures_of
from streams.evaluation.study import Study, run_study
from tests.factories.csft import make_features
from tests.factories.offline_folders import DAY, START, read_protocol, write, write_days, write_stream
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.datasets.spans import Span
from trainer.features.config import FeatureConfig
from trainer.metrics import user_auc
from trainer.networks.ciubm import DENSE_FEATURES
from trainer.offline import encoder_versions as vectors_module
from trainer.offline import registry
from trainer.offline.columns import read_columns
from trainer.offline.data import CtrData
from trainer.offline.encoder_versions import EncoderVersions, VectorKind, Vectors
from trainer.offline.labels import LabelKind
from trainer.offline.neural.ciubm import Ciubm
from trainer.offline.protocols import Protocol, ProtocolName
from trainer.offline.tabular import tabular
from trainer.samples.numbering import FeatureNumbers

SEEN: list[tuple[str, CtrData]] = []


class Spy:
    """Scores by popularity, times what the trial says, and remembers what it was shown."""

    name = "spy"
    calibrated = False
    trials = ({"sign": -1}, {"sign": 1})

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        SEEN.append(("fit", train))
        self._sign = trial["sign"]

    def predict(self, data: CtrData) -> np.ndarray:
        SEEN.append(("predict", data))
        column = data.rows.dense_NF[:, data.rows.dense_names.index("category share")]
        return self._sign * column.astype(float)


class Guesses:
    """Encoder versions whose vectors are noise."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol

    def vectors(self, kind: str, seed: int) -> Vectors:
        versions, size = len(self._protocol.encoder_stops), len(self._protocol.log.data.item_ids) + 1
        rows = np.random.default_rng(seed).normal(size=(versions, size, 4)).astype(np.float32)
        return Vectors(rows / np.linalg.norm(rows, axis=2, keepdims=True), np.ones((versions, size), bool))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"), users=400, items=120, takes=5_000)


def study_of(
    folder: Path, out: Path, name: ProtocolName = "prequential", kind: str = "csft", labels: LabelKind = "takes"
) -> Study:
    protocol, recorded = read_protocol(folder, name, labels)
    return Study(recorded, protocol, lambda: Guesses(protocol), kind, out, encoder={})  # type: ignore[arg-type,return-value]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    monkeypatch.setitem(registry.MODELS, "spy", f"{__name__}:Spy")


@pytest.mark.usefixtures("spied")
def test_trials_never_see_the_test_span_and_it_is_scored_once_per_seed(stream: Path, tmp_path: Path) -> None:
    study = study_of(stream, tmp_path)
    run_study(study, ["spy"], 2, advance=lambda done: None)
    test = study.protocol.test.start
    tuning, final = SEEN[:4], SEEN[4:]
    assert [kind for kind, _ in SEEN] == ["fit", "predict"] * 4
    assert all(data.rows.second_N.max() < test for _, data in tuning)
    assert tuning[0][1].rows.second_N.max() < study.protocol.validation.start
    for kind, data in final:
        assert data.rows.second_N.max() < test if kind == "fit" else data.rows.second_N.min() >= test
    assert final[0][1].rows.second_N.max() >= study.protocol.validation.start  # refitted on both
    assert study.tune("spy") == {"sign": 1}


@pytest.mark.usefixtures("spied")
def test_what_was_done_is_not_done_again(stream: Path, tmp_path: Path) -> None:
    first = run_study(study_of(stream, tmp_path), ["spy"], 1, advance=lambda done: None)
    SEEN.clear()
    again = run_study(study_of(stream, tmp_path), ["spy"], 2, advance=lambda done: None)
    assert [kind for kind, _ in SEEN] == ["fit", "predict"]  # the second seed alone
    assert np.array_equal(first[0].score_N, again[0].score_N)
    (tmp_path / "tuning" / "spy.json").write_text(json.dumps([{"trial": {"sign": 1}, "gauc": 0.4, "seconds": 0.0}]))
    SEEN.clear()
    run_study(study_of(stream, tmp_path), ["spy"], 2, advance=lambda done: None)
    assert len(SEEN) >= 2  # the trial that was missing; had it won, its scores would not be those that stand there


def test_a_folder_of_another_study_is_refused(stream: Path, tmp_path: Path) -> None:
    study = study_of(stream, tmp_path)
    with pytest.raises(Misconfigured, match="vectors"):
        study_of(stream, tmp_path, kind="frozen")
    with pytest.raises(Misconfigured, match="protocol"):
        study_of(stream, tmp_path, name="time-split")
    with pytest.raises(Misconfigured, match="labels, impressions"):
        study_of(stream, tmp_path, labels="ratings")
    about = json.loads((tmp_path / "study.json").read_text())
    assert about.pop("labels") == study.recorded.labels == "takes"
    (tmp_path / "study.json").write_text(json.dumps(about))  # as it was written when there were takes alone
    study_of(stream, tmp_path)


@pytest.mark.parametrize("column", ["user_N", "item_N", "second_N", "label_N", "dense_NF"])
def test_a_folder_whose_rows_were_changed_is_another_study(stream: Path, tmp_path: Path, column: str) -> None:
    study = study_of(stream, tmp_path)
    changed = getattr(study.recorded.rows, column).copy()
    changed.flat[7] = 1 - changed.flat[7]
    recorded = replace(study.recorded, rows=replace(study.recorded.rows, **{column: changed}))
    with pytest.raises(Misconfigured, match="impressions"):
        Study(recorded, study.protocol, study._make_versions, "csft", tmp_path, encoder={})


def test_figures_compare_with_ciubm_or_the_first_model(stream: Path, tmp_path: Path) -> None:
    study = study_of(stream, tmp_path)
    scores = run_study(study, ["category-affinity", "popularity"], 2, advance=lambda done: None)
    figures = figures_of(study, scores)
    overall = [row for row in figures.rows if row["bucket"] == "overall"]
    assert [(row["model"], row["seed"]) for row in overall] == [
        ("category-affinity", 0), ("popularity", 0), ("category-affinity", 1), ("popularity", 1)
    ]  # fmt: skip
    assert all(row["ci_low"] < row["gauc"] < row["ci_high"] for row in overall)
    gain = next(row for row in figures.paired if row["bucket"] == "overall")
    assert gain["reference"] == "category-affinity" and gain["model"] == "popularity"
    assert gain["low"] > 0 and gain["difference"] == pytest.approx(overall[0]["gauc"] - overall[1]["gauc"])
    assert "retaken" in figures.too_small


def test_only_scores_that_are_probabilities_have_a_loss_and_a_calibration(stream: Path, tmp_path: Path) -> None:
    study = study_of(stream, tmp_path)
    (scores,) = run_study(study, ["popularity"], 1, advance=lambda done: None)
    chances = 1 / (1 + np.exp(-scores.score_N))
    told = replace(scores, model="told", score_N=chances, calibrated=True)
    untold = replace(told, model="untold", calibrated=False)
    figures = figures_of(study, [untold, told])
    for row in (*figures.rows, *figures.means):
        assert (row["logloss"] is not None) == (row["ne"] is not None) == (row["model"] == "told")
    assert [one["model"] for one in figures.calibration] == ["told"]


def test_ciubm_reads_the_columns_of_the_stream_and_no_other(stream: Path, tmp_path: Path) -> None:
    protocol, _ = read_protocol(stream)
    recorded = read_columns(protocol, stream, live=FeatureConfig())
    study = Study(recorded, protocol, lambda: Guesses(protocol), "csft", tmp_path, encoder={})  # type: ignore[arg-type,return-value]
    _, names = tabular(study.data(0))
    left = [name for name in names if not name.startswith(Ciubm.left_out)]
    assert left == [*FeatureConfig().names, "has vector"] and len(left) == DENSE_FEATURES < len(names)


@pytest.mark.parametrize("name", ["logistic", "trees"])
def test_learners_read_taste_and_popularity_alone_reads_none(name: str, stream: Path, tmp_path: Path) -> None:
    study = study_of(stream, tmp_path)
    data, rows = study.data(0), np.concatenate([study.train_rows, study.validation_rows])
    test = data.select(study.test_rows)
    users, labels = test.rows.user_N, test.rows.label_N.astype(np.int64)

    def gauc(model_name: str, seed: int = 0) -> float:
        model = registry.create(model_name)
        model.fit(data.select(rows), None, seed=seed, trial=model.trials[0])
        scores = model.predict(test)
        assert np.array_equal(scores, model.predict(test)) and scores.min() > 0 and scores.max() < 1
        return user_auc(users, labels, scores).weighted

    found = gauc(name)
    assert found > 0.6 and found == gauc(name)
    if name == "trees":
        assert abs(gauc("dense-only") - 0.5) < 0.05


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(Misconfigured, match="no model 'tress'; choose from popularity"):
        registry.create("tress")


def test_a_set_of_three_days_is_too_short(tmp_path: Path) -> None:
    folder = write_days(tmp_path / "short", days=3)
    with pytest.raises(Misconfigured, match="too short"):
        read_protocol(folder, "time-split")


def test_no_encoder_version_learns_from_the_rows_that_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, _ = read_protocol(write_days(tmp_path / "days"))
    item_ids = protocol.log.data.item_ids
    n = len(item_ids)
    features, numbers = make_features(n), FeatureNumbers(item_ids, [str(one) for one in range(n)])
    shape = FusionConfig(width=8, nested_widths=(), hidden=0, text_rank=8, image_rank=8)
    versions = EncoderVersions(protocol, features, numbers, CsftConfig(), shape, PretrainConfig())
    newest: list[float] = []

    def learn(config, fusion, items, its_numbers, pairs, *, usable):  # type: ignore[no-untyped-def]
        newest.append(max(pair.row.second for pair in pairs))
        assert not usable[protocol.log.held_out].any()
        assert config.log_q_strength == 0

    monkeypatch.setattr(vectors_module, "learn", learn)
    made = versions.vectors("csft", 0)
    assert made.vectors_EIV.shape == (4, n + 1, 8) and not made.has_vector_EI[:, 0].any()
    assert len(newest) == 4
    for seen, stop in zip(newest, protocol.encoder_stops, strict=True):
        assert stop - DAY <= seen < stop
    newest.clear()
    stale = versions.vectors("stale", 0)
    assert len(newest) == 1 and np.array_equal(stale.vectors_EIV[0], stale.vectors_EIV[3])
    shuffled = versions.vectors("shuffled", 0)
    assert np.allclose(
        np.sort(shuffled.vectors_EIV[0, 1:], axis=0), np.sort(made.vectors_EIV[0, 1:], axis=0), atol=1e-5
    )
    assert not np.allclose(shuffled.vectors_EIV[0], made.vectors_EIV[0])


@pytest.mark.parametrize("kind", ["frozen", "pretrained"])
def test_what_is_published_after_the_encoders_time_changes_no_vector_of_an_earlier_item(
    kind: VectorKind, stream: Path
) -> None:
    protocol, _ = read_protocol(stream)
    item_ids = protocol.log.data.item_ids
    n = len(item_ids)
    known = protocol.log.published(Span(0, protocol.encoder_stops[0]))
    assert 0 < known[1:].sum() < protocol.log.published(Span(0, protocol.encoder_stops[-1]))[1:].sum()
    features, numbers = make_features(n), FeatureNumbers(item_ids, [str(one) for one in range(n)])
    rows = np.where(known[1:, None], features.text_NT, 3 - features.text_NT[::-1])
    other = replace(features, text_NT=rows.astype(features.text_NT.dtype))
    shape = FusionConfig(width=8, nested_widths=(), hidden=0, text_rank=8, image_rank=8)
    found, beside_other = (
        EncoderVersions(protocol, one, numbers, CsftConfig(), shape, PretrainConfig(epochs=1)).vectors(kind, 0)
        for one in (features, other)
    )
    assert np.allclose(found.vectors_EIV[:, known], beside_other.vectors_EIV[:, known], atol=1e-5)
    assert not np.allclose(found.vectors_EIV[:, ~known], beside_other.vectors_EIV[:, ~known], atol=1e-5)


def test_the_command_evaluates_a_folder_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_days(tmp_path / "days", users=400, items=40)
    monkeypatch.setenv("MIM_ENCODERS__CACHE_FOLDER", str(tmp_path / "cache"))
    monkeypatch.setenv("MIM_CSFT__EPOCHS", "1")
    arguments = ["evaluate", str(folder), "--models", "category-affinity,content-knn", "--seeds", "1", "--json"]
    assert cli.main(["--log-level", "error", *arguments, "--out", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    needed = {"model", "seed", "bucket", "auc", "gauc", "gauc_unweighted", "logloss", "ne", "impressions", "users",
              "ci_low", "ci_high"}  # fmt: skip
    assert all(needed <= set(row) for row in document["rows"])
    overall = {row["model"]: row["gauc"] for row in document["rows"] if row["bucket"] == "overall"}
    assert overall["category-affinity"] > 0.6
    page = (tmp_path / "out" / "report.html").read_text()
    assert "src='data:image/svg+xml;base64," in page and not re.search(r"""(href|src)=["']?http""", page)
    assert "| category-affinity |" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_judges_by_ratings_in_a_folder_of_its_own(
    tmp_path: Path, stream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIM_ENCODERS__CACHE_FOLDER", str(tmp_path / "cache"))
    arguments = ["evaluate", str(stream), "--models", "popularity", "--seeds", "1", "--vectors", "frozen"]
    assert cli.main(["--log-level", "error", *arguments, "--labels", "ratings", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["about"]["labels"] == "ratings" and document["about"]["negatives"] is None
    _, recorded = read_protocol(stream, "time-split", "ratings")
    assert sum(document["about"]["rows"][span] for span in ("train", "validation", "test")) <= len(recorded.rows)
    assert Path(document["out"]).name == f"{stream.name}-time-split-frozen-ratings"


def test_a_folder_without_ratings_is_not_judged_by_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_days(tmp_path / "days")
    assert cli.main(["evaluate", str(folder), "--labels", "ratings"]) == cli.EXIT_MISCONFIGURED
    assert "has no ratings" in capsys.readouterr().err


def test_a_folder_without_interactions_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    write(folder, "items", item_id=["a"], title=["a"], publish_ts=[START])
    write(folder, "interactions", user_id=["a"][:0], item_id=["a"][:0], ts=[1][:0], label=[1][:0])
    assert cli.main(["evaluate", str(folder)]) == cli.EXIT_MISCONFIGURED
