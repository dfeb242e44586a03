"""The rounds so far as a table and a plot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Line = Mapping[str, Any]


def read_rounds(file: Path) -> list[Line]:
    """The rounds of a results file; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_report(folder: Path, command: str) -> None:
    """`report.md` and `report.png` of the rounds and of the hunts for planted bugs that a folder holds."""
    rounds = read_rounds(folder / "rounds.jsonl")
    planted = folder / "planted.json"
    text = as_markdown(rounds, f"{command} --out DIR")
    if planted.exists():
        text += _hunts(json.loads(planted.read_text()))
    (folder / "report.md").write_text(text)
    draw(rounds, folder / "report.png")


def _hunts(hunts: Sequence[Line]) -> str:
    text = ["", "## Planted bugs", "", "    python -m tests.faults.planted --out DIR", ""]
    text += ["| bug | found | what was said of it |", "| --- | --- | --- |"]
    for hunt in hunts:
        said = "; ".join(" ".join(violation.split())[:200] for violation in hunt["violations"][:3]).replace("|", "/")
        text.append(f"| {hunt['bug']} | {'in round ' + str(hunt['rounds']) if hunt['found'] else 'no'} | {said} |")
    return "\n".join(text) + "\n"


def as_markdown(rounds: Sequence[Line], command: str) -> str:
    """A summary, and a line per fault."""
    by_fault: dict[str, list[Line]] = defaultdict(list)
    for line in rounds:
        for fault in line["faults"]:
            by_fault[fault].append(line)
    hot = sum(line["hot"] for line in rounds)
    violated = [line for line in rounds if line["violations"]]
    seconds = sum(line["seconds"] for line in rounds)
    text = [
        "# Fault injection",
        "",
        f"{len(rounds)} rounds, {sum(len(line['faults']) for line in rounds)} faults, {len(violated)} rounds with "
        f"violations. In {hot} rounds ({hot / max(1, len(rounds)):.0%}) every fault met un-acknowledged work of the "
        f"process that it concerns. {seconds / max(1, len(rounds)):.1f} s per round on the machine that ran them.",
        "",
        f"    {command}",
        "",
        "| fault | rounds | met un-acknowledged work | records un-acknowledged, median | settled after, median s | "
        "rounds with violations |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault, lines in sorted(by_fault.items()):
        left = [sum(line["unacknowledged"].get(fault, {}).values()) for line in lines]
        text.append(
            f"| {fault} | {len(lines)} | {sum(count > 0 for count in left)} | {median(left):.0f} | "
            f"{median([line['settled_seconds'] for line in lines]):.1f} | "
            f"{sum(bool(line['violations']) for line in lines)} |"
        )
    if mended := [line for line in rounds if line.get("mended")]:
        text += ["", f"A zombie's writes were found and mended in {len(mended)} rounds:", ""]
        text += [f"- round {line['number']}: {line['mended']}" for line in mended]
    if violated:
        text += ["", "## Violations", ""]
        for line in violated:
            text.append(f"- round {line['number']} (seed {line['seed']}; {', '.join(line['faults'])})")
            text += [f"  - {' '.join(violation.split())[:400]}" for violation in line["violations"]]
    return "\n".join(text) + "\n"


def draw(rounds: Sequence[Line], file: Path) -> None:
    """For each fault, how long its rounds took to settle; violated rounds in red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    faults = sorted({fault for line in rounds for fault in line["faults"]}, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(faults)), layout="constrained")
    for height, fault in enumerate(faults):
        lines = [line for line in rounds if fault in line["faults"]]
        for place, line in enumerate(lines):
            left = sum(line["unacknowledged"].get(fault, {}).values())
            axes.scatter(
                line["settled_seconds"],
                height + 0.3 * ((place * 0.618) % 1 - 0.5),
                s=12 + min(left, 200) / 3,
                color="tab:red" if line["violations"] else "tab:blue",
                alpha=0.6,
                linewidths=0,
            )
    axes.set_yticks(range(len(faults)), faults)
    axes.set_xlabel("seconds from the last record sent until every invariant holds (larger: more was un-acknowledged)")
    axes.set_title(f"{len(rounds)} rounds, {sum(bool(line['violations']) for line in rounds)} with violations (red)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
