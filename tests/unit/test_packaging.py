"""The four packages are ours, and what a user needs is packed with them."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("schemas", "encoders", "trainer", "streams")


@pytest.mark.parametrize("name", PACKAGES)
def test_flat_names_are_our_packages(name: str) -> None:
    # `trainer`, `encoders` and `schemas` also exist on the registry
    assert Path(str(import_module(name).__file__)).parent.parent == ROOT


def test_command_is_installed() -> None:
    (found,) = entry_points(group="console_scripts", name="mimstream")
    assert found.value == "streams.cli:main"


def test_every_data_file_is_packed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed: set[Path] = set()
    for package, patterns in declared.items():
        for base in [ROOT / p for p in PACKAGES] if package == "*" else [ROOT / package.replace(".", "/")]:
            for pattern in patterns:
                packed |= set(base.glob(pattern))
    data = {
        path
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    }
    assert data - packed == set()


@pytest.mark.parametrize(("name", "allowed"), [(name, PACKAGES[: n + 1]) for n, name in enumerate(PACKAGES)])
def test_lower_packages_never_import_higher_ones(name: str, allowed: tuple[str, ...]) -> None:
    for path in (ROOT / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots & set(PACKAGES) <= set(allowed), f"{path} imports {roots}"


@pytest.mark.parametrize("name", ["schemas", "encoders", "trainer"])
def test_lower_packages_know_no_network_no_environment_and_no_clock(name: str) -> None:
    forbidden = {"aiokafka", "kafka", "faust", "pymilvus", "redis", "aiohttp", "socket", "time"}
    for path in (ROOT / name).rglob("*.py"):
        source = path.read_text()
        assert "os.environ" not in source, path
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & forbidden, f"{path} imports {names}"


def test_environment_is_read_in_one_place_only() -> None:
    readers = {p.name for p in (ROOT / "streams").rglob("*.py") if "os.environ" in p.read_text()}
    assert readers <= {"settings.py"}


def test_linters_are_pinned_in_one_file_only() -> None:
    pinned = re.findall(r"^([a-z-]+)==", (ROOT / ".ci" / "checks.txt").read_text(), re.M)
    assert {"ruff", "import-linter"} <= set(pinned)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [line for extra in project["optional-dependencies"].values() for line in extra]
    others = [(ROOT / name).read_text() for name in (".ci/run", "Makefile", ".pre-commit-config.yaml")]
    for name in pinned:
        assert not re.search(rf"\b{name} *[=<>~]=", "\n".join([*project["dependencies"], *declared, *others])), name


def test_hooks_run_the_pinned_linters_and_fetch_nothing() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.+)", hooks) == ["local"]
    assert set(re.findall(r"language: (.+)", hooks)) == {"system"}
    assert all(entry.startswith(".venv-checks/bin/") for entry in re.findall(r"entry: (.+)", hooks))
