"""What the documents say is there, and what is there they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from streams.broker.topics import TOPICS
from streams.cli import COMMANDS
from streams.commands.settings import as_markdown
from streams.settings import describe_settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("schemas", "encoders", "trainer", "streams")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "tests/README.md")),
        ROOT / "tests" / "benchmarks" / "results" / "README.md",
        *sorted((ROOT / "deploy").glob("*.md")),
    )
}
README = DOCUMENTS["README.md"]
ARCHITECTURE = DOCUMENTS["ARCHITECTURE.md"]

each_document = pytest.mark.parametrize("name", DOCUMENTS)


def rooms() -> set[str]:
    return {
        str(path.parent.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")
    }


def test_every_command_has_a_row() -> None:
    listed = set(re.findall(r"^\| `mimstream ([a-z-]+)", DOCUMENTS["deploy/commands.md"], re.M))
    assert listed == set(COMMANDS)


def test_every_topic_has_a_row() -> None:
    listed = set(re.findall(r"^\| `([a-z-]+)` \| [a-z]", DOCUMENTS["deploy/topics.md"], re.M))
    assert listed == set(TOPICS)


def test_every_route_has_a_row() -> None:
    source = (ROOT / "streams" / "serving" / "api.py").read_text()
    routes = re.findall(r"router\.add_(?:get|post)\(\"([^\"{]+)", source)
    assert len(routes) == 6
    assert [route for route in routes if f"{route}" not in DOCUMENTS["deploy/http.md"]] == []


def test_the_list_of_settings_is_current() -> None:
    table = as_markdown(describe_settings())
    assert table in DOCUMENTS["deploy/settings.md"], "run: make settings"


@each_document
def test_variables_named_in_the_documents_exist(name: str) -> None:
    known = {row["variable"] for row in describe_settings()} | {"MIM_CONFIG", "MIM_TEST_DATA"}
    named = set(re.findall(r"MIM_[A-Z0-9_]+", DOCUMENTS[name]))
    assert named <= known, f"{name} names {sorted(named - known)}"


@each_document
def test_metrics_named_in_the_documents_exist(name: str) -> None:
    known = set(re.findall(r'"(mim_[a-z_]+)"', (ROOT / "streams" / "monitoring" / "metrics.py").read_text()))
    assert set(re.findall(r"\bmim_[a-z_]+", DOCUMENTS[name])) <= known


def test_every_room_has_one_row_in_the_architecture_and_every_row_is_a_room() -> None:
    table = ARCHITECTURE[: ARCHITECTURE.index("\n## Bird's-eye view")]
    rows = re.findall(r"^\| `([a-z_/]+)` \|", table, re.M)
    assert sorted(rows) == sorted(rooms())


def test_invariants_stand_with_a_room() -> None:
    headings = re.findall(r"^### `([^`]+)`$", ARCHITECTURE, re.M)
    assert len(headings) > 10
    assert set(headings) <= rooms()


@each_document
def test_files_and_folders_named_in_the_documents_exist(name: str) -> None:
    """A path counts from the root, or from the room of its heading or table row."""
    room, folder = ROOT, (ROOT / name).parent
    for line in DOCUMENTS[name].splitlines():
        if line.startswith("#"):
            heading = re.fullmatch(r"### `([^`]+)`", line)
            room = ROOT / heading[1] if heading else ROOT
        row = re.match(r"\| `([a-z_/]+)` \|", line)
        here = [ROOT, ROOT / row[1] if row else room, folder]
        for path in re.findall(r"`((?:[a-z_.]+/)*[a-z_]+\.py)`", line):
            generic = path == "config.py"  # each room's own
            assert generic or any((base / path).is_file() for base in here), f"{name}: {path}"
        for path in re.findall(r"`((?:schemas|encoders|trainer|streams|tests|deploy)(?:/[a-z_0-9]+)+)/?`", line):
            assert (ROOT / path).is_dir(), f"{name}: {path}"


def anchors(text: str) -> set[str]:
    return {re.sub(r"[^a-z0-9 _-]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}


@each_document
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


def test_every_page_and_every_example_is_linked_from_the_readme() -> None:
    pages = [*(ROOT / "deploy").glob("*.md"), *(ROOT / "tests" / "examples").glob("*.py")]
    assert len(pages) > 8
    assert [path.name for path in pages if f"({path.relative_to(ROOT)})" not in README] == []


def test_every_folder_of_tests_is_described() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert [name for name in folders if f"`{name}/`" not in DOCUMENTS["tests/README.md"]] == []


def test_recipes_that_are_named_exist() -> None:
    recipes = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"lint", "types", "layers", "test-unit", "test", "demo"} <= recipes
    text = "\n".join([(ROOT / ".ci" / "run").read_text(), *DOCUMENTS.values()])
    lines = re.findall(r"^ *make (?:--no-print-directory )?([a-z -]+?)(?: +#.*)?$", text, re.M)
    named = {word for line in lines for word in line.split()} | set(re.findall(r"`make ([a-z-]+)`", text))
    assert {"lint", "audit"} <= named <= recipes


def test_the_gate_runs_exactly_the_test_command_of_the_readme() -> None:
    expression = re.search(r"sed -n '([^']+)' README\.md", (ROOT / ".ci" / "run").read_text())
    assert expression is not None
    found = subprocess.run(["sed", "-n", expression[1], ROOT / "README.md"], capture_output=True, text=True, check=True)
    assert re.findall(r"^    (python3 -m venv \.venv && .*pytest.*)$", README, re.M) == found.stdout.splitlines()
    assert len(found.stdout.splitlines()) == 1


def test_modules_named_in_docstrings_and_comments_exist() -> None:
    wrong = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        text = path.read_text()
        for named in re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", text):
            if not any((base / named).exists() for base in (ROOT, ROOT / "streams", path.parent)):
                wrong.append(f"{path.relative_to(ROOT)}: {named}")
        for named in re.findall(r"`((?:schemas|encoders|trainer|streams)(?:\.[a-z_0-9]+)+)`", text):
            place = ROOT / named.replace(".", "/")
            if not (place.is_dir() or place.with_suffix(".py").exists() or place.parent.with_suffix(".py").exists()):
                wrong.append(f"{path.relative_to(ROOT)}: {named}")
    assert wrong == []


def test_no_test_module_imports_another() -> None:
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    names = {path.stem for path in modules}
    imported = re.compile(r"^\s*(?:from ([\w.]+) import (.+)|import ([\w.]+))", re.M)
    found = []
    for path in modules:
        for package, what, whole in imported.findall(path.read_text()):
            parts = {*(package or whole).split("."), *re.findall(r"\w+", what)}
            if (package or whole).split(".")[0] in {"tests", ""} and parts & names:
                found.append(f"{path.relative_to(ROOT)}: {package or whole}")
    assert found == []
