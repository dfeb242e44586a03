"""What `mimstream evaluate` refuses before it looks at a folder, and what it hands to the work behind it."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams.commands import evaluate
from streams.evaluation import figures, report, study
from streams.runtime import progress
from streams.settings import Settings
from streams.simulation import report as live_report
from streams.wiring import encoder_training, simulation
from tests.factories.commands import SETTINGS, call
from trainer.offline import registry


@pytest.mark.parametrize(
    ("protocol", "given"),
    [
        ("live", ("--models", "ciubm")),
        ("live", ("--seeds", "3")),
        ("live", ("--labels", "ratings")),
        ("time-split", ("--seed", "0")),
        ("prequential", ("--events", "100")),
        ("time-split", ("--limit", "100")),
        ("time-split", ("--broken", "0")),
        ("time-split", ("--against", "before")),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else given,
)
def test_an_option_that_the_protocol_does_not_look_at_is_refused(protocol: str, given: tuple[str, str]) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    options = parser.parse_args(["no such folder", "--protocol", protocol, *given])
    with pytest.raises(Misconfigured, match=f"{given[0]} does not go with --protocol {protocol}"):
        evaluate.run(options, Settings())


def test_vectors_of_a_bundle_go_with_the_live_protocol_alone() -> None:
    with pytest.raises(Misconfigured, match="--vectors bundle goes with --protocol live"):
        call(evaluate, "no such folder", "--vectors", "bundle")


def test_a_model_that_is_unknown_or_lacks_its_package_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def require(package: str, what: str) -> None:
        asked.append(f"{package} {what}")
        raise Misconfigured("not installed")

    monkeypatch.setattr(evaluate, "require_package", require)
    with pytest.raises(Misconfigured, match="nonsense"):
        call(evaluate, "no such folder", "--models", "nonsense,logistic")
    with pytest.raises(Misconfigured, match="not installed"):
        call(evaluate, "no such folder", "--models", "logistic")
    assert asked == ["sklearn model 'logistic'"]


@pytest.mark.parametrize(
    ("given", "asked", "seeds"),
    [
        (
            (),
            {"protocol_name": "time-split", "labels": "takes", "vectors": "csft", "neg_type": "pop", "queries": "auto",
             "out": None},
            3,
        ),
        (
            ("--protocol", "cold", "--labels", "ratings", "--vectors", "frozen", "--neg-type", "uni", "--seeds", "5",
             "--queries", "off", "--out", "here"),
            {"protocol_name": "cold", "labels": "ratings", "vectors": "frozen", "neg_type": "uni", "queries": "off",
             "out": Path("here")},
            5,
        ),
    ],
)  # fmt: skip
def test_a_study_is_of_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: Any, given: tuple[str, ...], asked: dict[str, Any], seeds: int
) -> None:
    opened, ran, written = list[Any](), list[Any](), list[Any]()
    ours = SimpleNamespace(out=Path("out"))

    def open_study(_: Any, folder: Path, **options: Any) -> Any:
        opened.append((folder, options))
        return ours

    def run_study(its: Any, models: list[str], count: int, *, advance: Any) -> str:
        ran.append((its is ours, models, count))
        return "scores"

    totals: list[int] = []
    bar = progress.progress_bar

    def noted(name: str, total: int) -> Any:
        totals.append(total)
        return bar(name, total)

    monkeypatch.setattr(progress, "progress_bar", noted)
    monkeypatch.setattr(encoder_training, "open_study", open_study)
    monkeypatch.setattr(study, "run_study", run_study)
    monkeypatch.setattr(figures, "figures_of", lambda its, scores: f"figures of {scores}")
    monkeypatch.setattr(report, "document_of", lambda its, scores, found: {"scores": scores, "figures": found})
    monkeypatch.setattr(report, "write_reports", lambda document, out: written.append((document, out)))
    monkeypatch.setattr(report, "markdown", lambda document: "the report")
    assert call(evaluate, "folder", "--models", "ciubm,din", *given) == 0
    assert opened == [(Path("folder"), asked)] and ran == [(True, ["ciubm", "din"], seeds)]
    assert totals == [sum(len(registry.create(name).trials) for name in ("ciubm", "din")) + 2 * seeds]
    ((document, out),) = written
    assert (document["scores"], document["figures"], out) == ("scores", "figures of scores", Path("out"))
    assert 0 <= document["wall_seconds"] < 60
    assert said().splitlines() == ["the report", "report: out/report.html"]
    assert call(evaluate, "folder", "--models", "ciubm,din", "--json", *given) == 0
    assert said(as_json=True)["out"] == "out"


@pytest.mark.parametrize(
    ("given", "asked", "written"),
    [
        (
            (),
            {"seed": 0, "takes": None, "limit": None, "broken": 0.0, "vectors": "bundle", "neg_type": "pop",
             "queries": "auto"},
            [],
        ),
        (
            ("--seed", "4", "--events", "50", "--limit", "90", "--broken", "0.5", "--vectors", "frozen", "--neg-type",
             "uni", "--queries", "off", "--out", "here", "--against", "before"),
            {"seed": 4, "takes": 50, "limit": 90, "broken": 0.5, "vectors": "frozen", "neg_type": "uni",
             "queries": "off"},
            [Path("here")],
        ),
    ],
)  # fmt: skip
def test_a_live_run_is_of_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: Any, given: tuple[str, ...], asked: dict[str, Any], written: list[Path]
) -> None:
    opened, wrote, described = list[Any](), list[Path](), list[Any]()

    def run(*, seed: int, advance: Any) -> str:
        return f"result of {seed}"

    def open_simulation(settings: Settings, folder: Path, **options: Any) -> Any:
        assert settings is SETTINGS and folder == Path("folder")
        opened.append(options)
        return SimpleNamespace(events=9, run=run, log="log")

    def document_of(result: str, log: str, *, other: Any, seed: int) -> dict[str, Any]:
        described.append((result, log, other, seed))
        return {"result": result}

    monkeypatch.setattr(simulation, "open_simulation", open_simulation)
    monkeypatch.setattr(live_report, "read_run", lambda folder: f"run in {folder}")
    monkeypatch.setattr(live_report, "document_of", document_of)
    monkeypatch.setattr(live_report, "write_run", lambda result, document, out: wrote.append(out))
    monkeypatch.setattr(live_report, "text_of", lambda document: document["result"])
    assert call(evaluate, "folder", "--protocol", "live", *given) == 0
    assert opened == [asked] and wrote == written
    seed = asked["seed"]
    assert described == [(f"result of {seed}", "log", "run in before" if given else None, seed)]
    assert said() == f"result of {seed}\n"
    assert call(evaluate, "folder", "--protocol", "live", "--json", *given) == 0
    assert said(as_json=True)["result"] == f"result of {seed}"
