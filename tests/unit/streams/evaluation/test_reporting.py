"""What a study's report says, in which order, and which scores it takes as its own."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from schemas.errors import Misconfigured
from streams.commands import evaluate
from streams.evaluation.figures import _mean
from streams.evaluation.report import _calibration, _span_words, markdown, page, statements, tables, write_reports
from streams.evaluation.study import Study, _file_name, run_study
from trainer.datasets.spans import Span

FIGURES = {
    "impressions": 1_200, "users": 300, "auc": 0.6, "gauc": 0.61, "gauc_unweighted": 0.62, "logloss": 0.5, "ne": None,
    "seeds": 2, "gauc_spread": 0.012, "ci_low": 0.60, "ci_high": 0.63,
}  # fmt: skip


def mean(model: str, bucket: str, **more: Any) -> dict[str, Any]:
    return FIGURES | {"model": model, "bucket": bucket} | more


def make_document(**more: Any) -> dict[str, Any]:
    gain = {"model": "din", "reference": "ciubm", "difference": 0.02, "low": -0.01, "high": 0.05}
    return {
        "about": {
            "data": "<a set>", "protocol": "time-split", "labels": "takes", "vectors": "csft", "versions": 4,
            "spans": {"encode": "E", "train": "T", "validation": "V", "test": "X"},
            "rows": {"train": 1_000, "validation": 200, "test": 300, "without_history": 40},
            "negatives": None, "features": [],
        },
        "means": [
            mean("din", "retaken"), mean("din", "cold", gauc=0.5), mean("ciubm", "cold", gauc_spread=None),
            mean("din", "overall"), mean("ciubm", "overall", gauc=0.7),
        ],
        "paired": [gain | {"bucket": "overall"}, gain | {"bucket": "retaken"}],
        "calibration": [],
        "too_small": [],
        "tuning": {"din": [{"trial": {"a": 1}, "gauc": 0.6, "chosen": False}, {"trial": {"a": 2}, "gauc": 0.7,
                                                                               "chosen": True}]},
        "cost": [{"model": "din", "seed": 0, "fit_seconds": 1.25, "predict_seconds": 0.5}],
    } | more  # fmt: skip


def test_tables_go_from_the_buckets_that_matter_to_cost_and_the_best_model_stands_first() -> None:
    found = tables(make_document())
    assert [title for title, _, _ in found] == [
        "overall: 1,200 impressions, 300 users", "cold: 1,200 impressions, 300 users",
        "retaken: 1,200 impressions, 300 users", "GAUC of ciubm minus", "Tuning: GAUC on the validation span",
        "Cost per seed",
    ]  # fmt: skip
    overall, cold = found[0][2], found[1][2]
    assert overall == [
        ["ciubm", "0.7000 ±0.012", "0.6000 to 0.6300", "0.6200", "0.6000", "0.5000", "", "2"],
        ["din", "0.6100 ±0.012", "0.6000 to 0.6300", "0.6200", "0.6000", "0.5000", "", "2"],
    ]
    assert [row[:2] for row in cold] == [["ciubm", "0.6100"], ["din", "0.5000 ±0.012"]]
    assert found[3][1:] == (["model", "overall"], [["din", "+0.0200 [-0.0100, +0.0500]"]])
    assert [row[3] for row in found[4][2]] == ["", "chosen"] and found[5][2] == [["din", "1.2", "0.5"]]
    for paired in ([], make_document()["paired"][1:]):  # of none, and of a bucket that is not shown
        assert "GAUC of ciubm minus" not in [title for title, _, _ in tables(make_document(paired=paired))]


def test_statements_say_what_was_compared_with_what_and_what_was_left_out() -> None:
    told = " ".join(statements(make_document()))
    for said in ("vectors csft", "learn from E, click models from T", "compared on V", "both X is scored once",
                 "4 encoder version(s)", "1,000 training, 200 validation and 300 test",
                 "40 of these, of users without a history", "as the set observed them"):  # fmt: skip
        assert said in told
    assert "Not reported" not in told
    document = make_document(too_small=["cold", "retaken"])
    assert "left out" not in markdown(document)
    document["about"]["left_out"] = "3 rows are left out"
    assert "Of the folder, 3 rows are left out." in markdown(document)
    document["about"]["negatives"] = "drawn by seed 0"
    told = " ".join(statements(document))
    assert "100 users with both labels: cold, retaken." in told and "led to nothing: drawn by seed 0." in told


def test_statements_say_which_labels_were_judged() -> None:
    document = make_document()
    assert "Labels takes: 1 for a take, 0 for an exposure alone." in " ".join(statements(document))
    document["about"]["labels"] = "ratings"
    told = " ".join(statements(document))
    assert "Labels ratings: the impressions are the rated takes alone, none is drawn. 1: rated above the mean" in told
    assert "Exposures" not in told
    del document["about"]["labels"]  # a report from when there were takes alone
    assert "Labels takes" in " ".join(statements(document))


def test_a_report_is_written_in_three_forms_and_escapes_names(tmp_path: Path) -> None:
    bins = [{"predicted": 0.1, "observed": 0.2}]
    document = make_document(calibration=[{"model": "din", "seed": 0, "bins": bins}])
    write_reports(document, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == document
    assert (tmp_path / "report.md").read_text() == markdown(document)
    assert markdown(document).splitlines()[0] == "# <a set>: time-split"
    text = (tmp_path / "report.html").read_text()
    assert "&lt;a set&gt;" in text and "<a set>" not in text and text.count("data:image/svg") == 2
    assert page(make_document()).count("data:image/svg") == 1
    with pytest.raises(Misconfigured, match="--out"):
        write_reports(document, tmp_path / "nowhere")


def test_the_page_plots_the_first_seed_of_a_model_and_nothing_where_every_bucket_was_too_small() -> None:
    first, second = ({"model": "din", "seed": n, "bins": [{"predicted": 0.1 + n, "observed": 0.2}]} for n in (0, 1))
    both, one, other, none = (_calibration(make_document(calibration=bins)) for bins in
                              ([first, second], [first], [second], []))  # fmt: skip
    assert both == one != other and none == ""
    small = page(make_document(means=[], paired=[], too_small=["overall"]))
    assert "100 users with both labels: overall." in small


def second(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    ("start", "stop", "words"),
    [
        ("2025-05-01", "2025-05-02", "01 May 2025"),
        ("2025-05-01", "2025-05-04", "01 May to 03 May 2025"),
        ("2025-05-01T06:00", "2025-05-02", "01 May 06:00 to 02 May 2025 00:00"),
        ("2025-05-01", "2025-05-01T06:00", "01 May 00:00 to 01 May 2025 06:00"),
    ],
)
def test_a_span_of_whole_days_is_told_in_days(start: str, stop: str, words: str) -> None:
    assert _span_words(Span(second(start), second(stop))) == words


def test_figures_over_seeds_are_means_but_for_counts() -> None:
    seeds: Any = [
        SimpleNamespace(figures={"impressions": 500, "users": 100, "gauc": one, "ne": None}) for one in (0.5, 0.7)
    ]
    found = _mean(seeds)
    assert (found["impressions"], found["users"], found["ne"]) == (500, 100, None)
    assert found["gauc"] == pytest.approx(0.6) and found["gauc_spread"] == pytest.approx(0.2 / 2**0.5)
    assert _mean(seeds[:1])["gauc_spread"] is None


# ---- scores that stand already ---------------------------------------------------------------------------------------


def test_scores_of_another_trial_are_not_this_trials(tmp_path: Path) -> None:
    study = Study.__new__(Study)
    path = tmp_path / "din-1.npz"
    assert study._stored(path, "din", 1, {"a": 1}) is None
    np.savez(path, score=np.array([0.5]), calibrated=True, seconds=np.array([1.5, 2.5]), trial='{"a": 1, "b": 2}')
    assert study._stored(path, "din", 1, {"a": 2, "b": 2}) is None
    found = study._stored(path, "din", 1, {"b": 2, "a": 1})
    assert found is not None and (found.model, found.seed, found.calibrated) == ("din", 1, True)
    assert (found.fit_seconds, found.predict_seconds, found.score_N.tolist()) == (1.5, 2.5, [0.5])


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5], [0.5, float("nan")], [[0.5], [0.5]]])
def test_scores_that_are_not_one_finite_number_a_row_end_the_study(scores: Any) -> None:
    model: Any = SimpleNamespace(name="din", predict=lambda data: np.array(scores))
    rows: Any = [1, 2]
    with pytest.raises(ArithmeticError, match="din gave scores"):
        Study.__new__(Study)._checked(model, rows)
    model.predict = lambda data: [0, 1]
    assert Study.__new__(Study)._checked(model, rows).tolist() == [0.0, 1.0]


def test_a_study_that_is_cut_short_has_as_many_seeds_of_each_model() -> None:
    done: list[Any] = []
    advanced: list[int] = []

    class Told:
        def tune(self, name: str, *, on_trial: Any) -> dict[str, str]:
            on_trial()
            return {"of": name}

        def score(self, name: str, seed: int, trial: Any) -> Any:
            done.append((name, seed, trial))

    told: Any = Told()
    assert len(run_study(told, ["a", "b"], 2, advance=advanced.append)) == 4
    assert done == [("a", 0, {"of": "a"}), ("b", 0, {"of": "b"}), ("a", 1, {"of": "a"}), ("b", 1, {"of": "b"})]
    assert sum(advanced) == 2 + 4
    assert _file_name("Dense only/2") == "dense-only-2" and set(evaluate.NEEDED) == {"logistic", "tfidf-query"}


def test_of_trials_that_are_equally_good_the_first_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.__new__(Study)
    monkeypatch.setattr(study, "_trials", lambda name: [{"a": 1}, {"a": 2}, {"a": 3}])
    rows = [{"trial": {"a": n}, "gauc": gauc} for n, gauc in ((3, 0.6), (2, 0.6), (1, 0.5))]
    assert study._best("din", rows)["trial"] == {"a": 2}
