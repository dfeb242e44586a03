"""A study's report: Markdown, JSON, and one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.errors import Misconfigured
from streams.evaluation.figures import Figures
from streams.evaluation.study import Study, TestScores
from streams.runtime.plots import as_image
from trainer.datasets.spans import Span
from trainer.offline.columns import Recorded
from trainer.samples.searches import HIDDEN_OF

SHOWN = ("overall", "cold", "under_24h", "under_7d", "never_taken", "without_history")
_HEAD = ("model", "GAUC", "95 % interval", "unweighted", "AUC", "log-loss", "NE", "seeds")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2126; max-width: 1080px; margin: 2.5em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0; } th, td { padding: .2em .7em; text-align: right; }
th { border-bottom: 1px solid #aab; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f7f9; } img { max-width: 100%; height: auto; }
"""

Table = tuple[str, Sequence[str], list[list[str]]]
"""Heading, column heads, cells."""


def document_of(study: Study, scores: list[TestScores], figures: Figures) -> dict[str, Any]:
    """The whole report as one object, ready for JSON."""
    protocol, recorded = study.protocol, study.recorded
    models = list(dict.fromkeys(one.model for one in scores))
    spans = {
        "encode": protocol.encode,
        "train": protocol.train,
        "validation": protocol.validation,
        "test": protocol.test,
    }
    return {
        "about": {
            "data": protocol.log.data.name,
            "protocol": protocol.name,
            "labels": recorded.labels,
            "vectors": study.kind,
            "versions": len(protocol.encoder_stops),
            "spans": {name: _span_words(span) for name, span in spans.items()},
            "rows": {
                "train": len(study.train_rows),
                "validation": len(study.validation_rows),
                "test": len(study.test_rows),
                "without_history": int((~recorded.facts.with_history_N[study.test_rows]).sum()),
            },
            "negatives": recorded.drawn_from,
            "left_out": protocol.log.data.left_out,
            "searches": _searches(recorded),
            "features": list(recorded.rows.dense_names),
        },
        "rows": figures.rows,
        "means": figures.means,
        "paired": figures.paired,
        "calibration": figures.calibration,
        "too_small": figures.too_small,
        "tuning": {name: study.tuning(name) for name in models},
        "cost": [
            {
                "model": one.model,
                "seed": one.seed,
                "fit_seconds": one.fit_seconds,
                "predict_seconds": one.predict_seconds,
            }
            for one in scores
        ],
    }


def write_reports(document: dict[str, Any], out: Path) -> None:
    """Write report.json, report.md and report.html. Raises `Misconfigured` if the folder cannot be written."""
    try:
        (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (out / "report.md").write_text(markdown(document), encoding="utf-8")
        (out / "report.html").write_text(page(document), encoding="utf-8")
    except OSError as error:
        raise Misconfigured(f"the report cannot be written to {out} (--out): {error.strerror}") from None


def statements(document: dict[str, Any]) -> list[str]:
    """What was compared with what, in sentences."""
    about = document["about"]
    lines = [
        f"Protocol {about['protocol']}, vectors {about['vectors']}: encoders learn from "
        f"{about['spans']['encode']}, click models from {about['spans']['train']}, trials are compared on "
        f"{about['spans']['validation']}, and after a refit on both {about['spans']['test']} is scored once.",
        f"{about['versions']} encoder version(s); none saw anything of the rows that it serves or later.",
        f"{about['rows']['train']:,} training, {about['rows']['validation']:,} validation and "
        f"{about['rows']['test']:,} test impressions; {about['rows']['without_history']:,} of these, of users without "
        "a history, are a bucket of their own. Held-out items and re-takes teach nothing.",
        _judged_by(about),
        "GAUC: per-user AUC over the whole test span, users with both labels, weighted by impressions. Intervals: "
        "95 %, bootstrap over users of the seed-averaged AUC. Every model had the trials shown below, on one seed.",
    ]
    if about.get("searches"):
        lines.append(_read_of_searches(about["searches"]))
    if about.get("left_out"):
        lines.append(f"Of the folder, {about['left_out']}.")
    if document["too_small"]:
        lines.append(
            f"Not reported, under 500 impressions or 100 users with both labels: {', '.join(document['too_small'])}."
        )
    return lines


def tables(document: dict[str, Any]) -> list[Table]:
    """One table per bucket, then model against model, tuning, and cost."""
    found: list[Table] = []
    buckets = list(dict.fromkeys(row["bucket"] for row in document["means"]))
    for bucket in [*(one for one in SHOWN if one in buckets), *(one for one in buckets if one not in SHOWN)]:
        rows = sorted((row for row in document["means"] if row["bucket"] == bucket), key=lambda row: -row["gauc"])
        title = f"{bucket}: {rows[0]['impressions']:,} impressions, {rows[0]['users']:,} users"
        found.append((title, _HEAD, [_figures(row) for row in rows]))
    paired = [row for row in document["paired"] if row["bucket"] in SHOWN]
    if paired:
        shown = [one for one in SHOWN if any(row["bucket"] == one for row in paired)]
        at = {(row["model"], row["bucket"]): row for row in paired}
        cells = [[model, *(_gain(at.get((model, one))) for one in shown)] for model in dict.fromkeys(k for k, _ in at)]
        found.append((f"GAUC of {paired[0]['reference']} minus", ["model", *shown], cells))
    trials = [
        [model, json.dumps(row["trial"]), _number(row["gauc"]), "chosen" if row["chosen"] else ""]
        for model, rows in document["tuning"].items()
        for row in rows
    ]
    found.append(("Tuning: GAUC on the validation span", ["model", "trial", "GAUC", ""], trials))
    cost = [[one["model"], f"{one['fit_seconds']:.1f}", f"{one['predict_seconds']:.1f}"] for one in document["cost"]]
    found.append(("Cost per seed", ["model", "fit, s", "score the test span, s"], cost))
    return found


def markdown(document: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    lines = [f"# {document['about']['data']}: {document['about']['protocol']}", ""]
    lines += [f"- {one}" for one in statements(document)] + [""]
    for title, head, rows in tables(document):
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def page(document: dict[str, Any]) -> str:
    """The whole report as one HTML page with plots."""
    title = html.escape(f"{document['about']['data']}: {document['about']['protocol']}")
    body = [f"<h1>{title}</h1>", "<ul>", *(f"<li>{html.escape(one)}</li>" for one in statements(document)), "</ul>"]
    body += [_bars(document), _calibration(document)]
    for heading, head, rows in tables(document):
        cells = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        heads = "".join(f"<th>{html.escape(one)}</th>" for one in head)
        body.append(f"<h2>{html.escape(heading)}</h2><table><tr>{heads}</tr>{''.join(cells)}</table>")
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _figures(row: dict[str, Any]) -> list[str]:
    spread = f" ±{row['gauc_spread']:.3f}" if row["gauc_spread"] is not None else ""
    return [
        row["model"],
        _number(row["gauc"]) + spread,
        f"{_number(row['ci_low'])} to {_number(row['ci_high'])}",
        *(_number(row[name]) for name in ("gauc_unweighted", "auc", "logloss", "ne")),
        str(row["seeds"]),
    ]


def _gain(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _bars(document: dict[str, Any]) -> str:
    """GAUC with intervals, bucket by bucket; nothing where every bucket was too small."""
    means = document["means"]
    shown = [one for one in SHOWN if any(row["bucket"] == one for row in means)]
    if not shown:
        return ""
    figure, panels = _panels(len(shown), height=1.0 + 0.28 * len({row["model"] for row in means}))
    for panel, bucket in zip(panels, shown, strict=True):
        rows = sorted((row for row in means if row["bucket"] == bucket), key=lambda row: row["gauc"])
        centre = [row["gauc"] for row in rows]
        sides = [
            [max(0.0, row["gauc"] - row["ci_low"]) for row in rows],
            [max(0.0, row["ci_high"] - row["gauc"]) for row in rows],
        ]
        panel.errorbar(centre, range(len(rows)), xerr=sides, fmt="o", color="#0b6e99", ecolor="#9fb6c4", markersize=4)
        panel.set_yticks(range(len(rows)), [row["model"] for row in rows], fontsize=7)
        panel.axvline(0.5, color="#b0632a", linewidth=0.8)
        panel.set_title(f"GAUC, {bucket}", fontsize=9)
        panel.tick_params(axis="x", labelsize=7)
    return as_image(figure)


def _calibration(document: dict[str, Any]) -> str:
    """Predicted against observed, first seed of each model."""
    first: dict[str, list[dict[str, float]]] = {}
    for row in document["calibration"]:
        first.setdefault(row["model"], row["bins"])
    if not first:
        return ""
    figure, (panel,) = _panels(1, height=4.0)
    for model, bins in first.items():
        panel.plot([one["predicted"] for one in bins], [one["observed"] for one in bins], marker=".", label=model)
    top = max(one[name] for bins in first.values() for one in bins for name in ("predicted", "observed"))
    panel.plot([0, top], [0, top], color="#8a8f98", linewidth=0.8)
    panel.set_xlabel("predicted, by decile")
    panel.set_ylabel("observed")
    panel.legend(fontsize=7)
    return as_image(figure)


def _panels(count: int, *, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _judged_by(about: dict[str, Any]) -> str:
    """What was judged, and what its labels mean."""
    if about.get("labels") == "ratings":
        return (
            "Labels ratings: the impressions are the rated takes alone, none is drawn. 1: rated above the mean of the "
            "user's earlier ratings, or, for their first, of all users' earlier ones; 0: equal or below."
        )
    exposures = about["negatives"] or "as the set observed them"
    return f"Labels takes: 1 for a take, 0 for an exposure alone. Exposures that led to nothing: {exposures}."


def _searches(recorded: Recorded) -> dict[str, Any] | None:
    """Distinct queries, and the shares of rows that see one and that see a trigger item; None where none can."""
    if not recorded.reads_searches:
        return None
    rows = recorded.rows
    shares = [0.0 if column is None else float((column > 0).mean()) for column in (rows.query_N, rows.trigger_N)]
    return {"queries": recorded.items.queries, "rows_with_query": shares[0], "rows_with_trigger": shares[1]}


def _read_of_searches(searches: dict[str, Any]) -> str:
    return (
        f"Every model sees what was searched ({searches['queries']:,} distinct queries, "
        f"{searches['rows_with_query']:.1%} of the impressions; one of {HIDDEN_OF} is hidden) and the item looked at "
        f"just before ({searches['rows_with_trigger']:.1%}), as the newest of the history."
    )


def _span_words(span: Span) -> str:
    """`start` to `stop` in UTC; whole days as dates."""
    start, stop = (datetime.fromtimestamp(second, UTC) for second in (span.start, span.stop))
    if start.time() == stop.time() == datetime.min.time():
        last = datetime.fromtimestamp(span.stop - 1, UTC)
        return f"{start:%d %B %Y}" if last.date() == start.date() else f"{start:%d %B} to {last:%d %B %Y}"
    return f"{start:%d %B %H:%M} to {stop:%d %B %Y %H:%M}"
