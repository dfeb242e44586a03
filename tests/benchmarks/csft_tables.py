"""Table and picture of the C-SFT study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

REFERENCES = ("popularity", "frozen text", "frozen image", "frozen text + image", "frozen, weaker towers")

Results = dict[str, dict[str, dict[str, Any]]]
"""Data set, arm, seed: a row."""


def render(results: Results) -> str:
    """The results as Markdown, a table for each data set and way of asking."""
    lines = [
        "# C-SFT study",
        "",
        "Recall@50 of the next taken item: all / cold among all / cold among cold. Means over seeds ± half the range.",
        "Settings were chosen on the validation span; the test span stands beside it and chose nothing.",
        "`cosine` is the mean pairwise cosine of the space.",
        "",
    ]
    for name, arms in results.items():
        kinds = sorted({kind for seeds in arms.values() for row in seeds.values() for kind in row.get("test", {})})
        lines += [f"## {name}", "", *_table(arms, kinds), ""]
        for title, suffix in (
            ("With popularity added at retrieval (`health.with_popularity`), test span", "with_popularity"),
            ("The first 64 of 128 dimensions, test span", "64"),
            ("Among the whole catalogue, test span", "catalogue"),
        ):
            key = f"test_{suffix}"
            found = {arm: seeds for arm, seeds in arms.items() if any(key in row for row in seeds.values())}
            if found:
                lines += [f"### {title}", "", *_table(found, kinds, key=key), ""]
    return "\n".join(lines)


def _table(arms: dict[str, Any], kinds: list[str], key: str | None = None) -> list[str]:
    spans = [key] if key else ["validation", "test"]
    header = ["arm", "seeds", *(f"{kind} {span.split('_')[0]}" for kind in kinds for span in spans)]
    header += [] if key else ["cosine"]
    lines = []
    for arm, seeds in arms.items():
        rows = [row for row in seeds.values() if spans[0] in row]
        cells = [cell([row[span][kind] for row in rows if kind in row[span]]) for kind in kinds for span in spans]
        if not key:
            cosines = [row["geometry"]["mean_pairwise_cosine"] for row in rows if "geometry" in row]
            shown = f"{np.mean(cosines):.2f}" if cosines else ""
            cells.append(shown + (" **collapsed**" if any(row.get("collapse") for row in rows) else ""))
        lines.append([arm, str(len(rows)), *cells])
    return markdown_table(header, lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def cell(rows: list[dict[str, Any]]) -> str:
    """Three recalls of several seeds."""
    parts = []
    for key in ("all", "cold", "cold_among_cold"):
        values = [row[key] for row in rows if row[key] is not None]
        spread = f"±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 and key == "cold_among_cold" else ""
        parts.append(f"{np.mean(values):.3f}{spread}".replace("0.", ".") if values else "-")
    return " / ".join(parts)


def plot(results: Results, path: Path) -> None:
    """Cold among cold on the test span, arm by arm, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 0.32 * max(len(arms) for arms in results.values()) + 1
    figure, axes = pyplot.subplots(1, len(results), figsize=(8 * len(results), height), squeeze=False)
    for axis, (name, arms) in zip(axes[0], results.items(), strict=True):
        kind = "basket" if any("basket" in row["test"] for row in next(iter(arms.values())).values()) else "next"
        names = list(arms)[::-1]
        values = [[row["test"][kind]["cold_among_cold"] or 0 for row in arms[arm].values()] for arm in names]
        colours = ["#999" if arm in REFERENCES else "#27c" for arm in names]
        axis.barh(names, [np.mean(found) for found in values], color=colours)
        for place, found in enumerate(values):
            axis.plot(found, [place] * len(found), "k.", markersize=4)
        axis.set_title(f"{name}: {kind}, cold among cold, recall@50, test span")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
