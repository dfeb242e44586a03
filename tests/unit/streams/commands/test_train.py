"""What `mimstream train` asks for, prints and ends with."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams.commands import train
from streams.settings import Settings
from streams.wiring.training import TrainOptions

REPORT: dict[str, Any] = {
    "accounts": {"received": 9, "late": 2},
    "rows_trained": 7,
    "steps": 3,
    "rows_sha256": "abc",
    "releases": 1,
    "refused": 4,
    "release_id": "r000001-0",
    "not_serving": None,
    "prequential": {"ciubm": {"all": {"auc": 0.61239, "rows": 5}, "cold": None}},
}


class Asked:
    settings: Settings
    options: TrainOptions


def run(monkeypatch: pytest.MonkeyPatch, report: dict[str, Any] | None, *arguments: str) -> tuple[int, Asked]:
    asked = Asked()

    async def trained(settings: Settings, options: TrainOptions) -> dict[str, Any] | None:
        asked.settings, asked.options = settings, options
        return report

    monkeypatch.setattr(train, "train", trained)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.run(parser.parse_args(arguments), Settings()), asked


@pytest.mark.parametrize(
    ("report", "arguments", "status"),
    [
        (None, (), 0),  # it was stopped
        (REPORT, ("--until-end",), 0),
        (REPORT | {"not_serving": "r000002-0 was refused: log-loss"}, ("--until-end",), 5),
        (REPORT | {"not_serving": "nothing was released"}, ("--until", "2026-01-01T00:00:00Z", "--json"), 5),
    ],
)
def test_a_run_to_the_end_that_does_not_serve_what_it_learned_ends_with_5(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    report: dict[str, Any] | None,
    arguments: tuple[str, ...],
    status: int,
) -> None:
    assert run(monkeypatch, report, *arguments)[0] == status
    told = capsys.readouterr().out
    if report is None:
        assert told == ""
    elif "--json" in arguments:
        assert json.loads(told) == report
    else:
        assert told.splitlines() == [
            "behaviours: 9 received, 2 late",
            "7 rows in 3 steps, rows sha256 abc",
            "1 releases, 4 refused, current r000001-0",
            *filter(None, [report["not_serving"]]),
            "ciubm all: auc 0.6124, rows 5",
        ]


def test_options_reach_the_run_and_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    _, asked = run(
        monkeypatch, None, "--until", "2026-01-01T00:00:00Z", "--no-release", "--replace",
        "--from", "2025-12-31T00:00Z", "--scores", "s", "--rows", "r", "--metrics-port", "9",
        "--variants", "ciubm,din", "--fetch-max-records", "8", "--state", str(tmp_path),
    )  # fmt: skip
    assert asked.options == TrainOptions(
        until_end=True, release=False, write_state=True, from_snapshot=None, from_offsets=None,
        from_time=datetime(2025, 12, 31, tzinfo=UTC), until=moment, scores=Path("s"), rows=Path("r"), replace=True,
        metrics_port=9,
    )  # fmt: skip
    settings = asked.settings.train
    assert (settings.variants, settings.fetch_max_records, settings.state_folder) == ("ciubm,din", 8, tmp_path)
    _, asked = run(monkeypatch, None, "--from-snapshot", "n1")
    assert asked.options.from_snapshot == "n1" and asked.settings == Settings()
    _, asked = run(monkeypatch, None, "--from-offsets", "o.json")
    assert asked.options.from_offsets == Path("o.json")


@pytest.mark.parametrize("option", ["--from", "--until"])
def test_a_time_that_cannot_be_read_is_told_with_its_option(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    for text in ("yesterday", "2026-01-01T00:00"):
        with pytest.raises(Misconfigured, match=f"^{option} '{text}'"):
            run(monkeypatch, None, option, text)


@pytest.mark.parametrize(
    ("arguments", "writes"), [((), True), (("--no-release",), False), (("--no-release", "--state", "x"), True)]
)
def test_a_run_beside_an_active_trainer_leaves_its_state_alone(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], writes: bool
) -> None:
    assert run(monkeypatch, None, *arguments)[1].options.write_state is writes


@pytest.mark.parametrize("option", [("--json",), ("--rows", "file")])
def test_what_describes_a_finished_run_needs_one(monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]) -> None:
    with pytest.raises(Misconfigured, match="--until-end"):
        run(monkeypatch, REPORT, *option)
    run(monkeypatch, REPORT, *option, "--until-end")
