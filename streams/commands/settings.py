"""`mimstream settings`."""

from __future__ import annotations

import argparse
import json

from streams.runtime.terminal import print_table
from streams.settings import Settings, describe_settings, describe_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """List what can be set, with the values in force; secrets are not shown."""
    if options.markdown:
        print(as_markdown(describe_settings()))
        return 0
    values = describe_values(settings)
    rows = [
        {"variable": row["variable"], "value": values[row["variable"]][0], "from": values[row["variable"]][1]} | row
        for row in describe_settings()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        heads = ("variable", "value", "from", "default", "meaning")
        print_table(heads, [[row[head] for head in heads] for row in rows])
    return 0


def as_markdown(rows: list[dict[str, str]]) -> str:
    """The table of `deploy/settings.md`."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for row in rows:
        cells = [row["variable"], f"`{row['default']}`" if row["default"] else "", row["meaning"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
