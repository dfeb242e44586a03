"""What the documents say is there, and what is there they say."""

from __future__ import annotations

import re
from pathlib import Path

from streams.broker.topics import TOPICS
from streams.cli import COMMANDS
from streams.commands.settings import as_markdown
from streams.settings import describe_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme() -> None:
    assert [command for command in COMMANDS if f"mimstream {command}" not in README] == []


def test_every_topic_is_in_the_readme() -> None:
    assert [name for name in TOPICS if f"`{name}`" not in README] == []


def test_the_list_of_settings_is_current() -> None:
    written = (ROOT / "deploy" / "settings.md").read_text()
    table = as_markdown(describe_settings())
    assert table in written, "run: mimstream settings --markdown, and put the table into deploy/settings.md"


def test_variables_named_in_the_documents_exist() -> None:
    known = {row["variable"] for row in describe_settings()} | {"MIM_CONFIG", "MIM_TEST_DATA"}
    for document in ("README.md", "ARCHITECTURE.md", "deploy/README.md"):
        named = set(re.findall(r"MIM_[A-Z0-9_]+", (ROOT / document).read_text()))
        assert named <= known, f"{document} names {sorted(named - known)}"


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text):
        assert list(ROOT.glob(f"*/{path}")) or (ROOT / path).exists(), path


def test_links_inside_the_readme_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_gate_and_readme_run_the_same_test_command() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/\^(.*?)\$/", gate)
    assert pattern is not None
    commands = re.findall(r"^    (python3 -m venv \.venv && .*pytest.*)$", README, re.M)
    assert len(commands) == 1
