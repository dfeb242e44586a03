"""Packages that are not there are named before any work, as an index knows them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams import cli
from streams.commands.evaluate import NEEDED
from streams.runtime import extras
from trainer.offline import registry

ROOT = Path(__file__).parents[4]


def optional() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return " ".join(line for lines in project["optional-dependencies"].values() for line in lines)


def test_advice_names_distributions_that_an_index_has() -> None:
    named: set[str] = set(extras.PACKAGES.values())
    for package in ("schemas", "encoders", "trainer", "streams"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"mimstream\[", text), path  # no index has a distribution of ours
            named |= set(re.findall(r"pip install '?([a-z0-9-]+)", text))
    assert len(named) >= 4
    assert [name for name in named if name not in optional()] == []


@pytest.mark.parametrize("arguments", [["evaluate", "/nowhere", "--models", "logistic"], ["bench", "train"]])
def test_a_missing_package_ends_the_command_before_it_reads_anything(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    assert cli.main(arguments) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "csft"])
def test_adapters_without_their_package_are_refused_first(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    assert cli.main([command, "--data", "/nowhere", "--set", "tuning.layers=lora"]) == 2


def test_every_model_that_needs_a_package_is_listed() -> None:
    all_models = registry.MODELS | registry.OF_SEARCHES
    outside = {name for name, where in all_models.items() if where.split(":")[0].endswith((".linear", ".query_words"))}
    assert set(NEEDED) == outside


def test_what_is_there_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = object()
    monkeypatch.setattr(extras, "find_spec", lambda module: found)
    extras.require_package("sklearn", "x")
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(Misconfigured, match="x needs scikit-learn: pip install scikit-learn"):
        extras.require_package("sklearn", "x")
