"""The demo's report: one self-contained HTML file with plots and pictures, and the same on the terminal."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from schemas.errors import Misconfigured
from streams.demo.outcome import BUCKETS, VARIANTS, DemoResult
from streams.runtime.plots import as_image
from streams.runtime.terminal import escaped, print_table
from trainer.datasets.folder import DataSet

_NAMES = {
    "ciubm": "CiUBM (content)",
    "din": "DIN (ids only)",
    "ciubm_shuffled": "CiUBM, vectors shuffled",
    "overall": "all first-time impressions",
    "under_1h": "items under 1 h old",
    "under_24h": "items under 24 h old",
    "older": "older items and the catalogue",
    "retaken": "items the user had taken before",
}
_COLOURS = {"ciubm": "#0b6e99", "din": "#b0632a", "ciubm_shuffled": "#8a8f98"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2126; max-width: 980px; margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.7em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; margin: .6em 0; display: block; overflow-x: auto; }
th, td { padding: .25em .8em; text-align: right; }
th { font-weight: 600; border-bottom: 1px solid #aab; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f7f9; }
.near { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 14px; }
figure { margin: 0; width: 120px; font-size: 12px; }
figure img, .none { width: 120px; height: 180px; object-fit: cover; background: #e3e7eb; display: block; }
.new img { outline: 3px solid #0b6e99; } .bad { color: #a51d1d; font-weight: 600; } .good { color: #17663a; }
img.plot { max-width: 100%; height: auto; }
"""


def write_html(result: DemoResult, data: DataSet, path: Path) -> None:
    """Write the report. Raises `Misconfigured` if the file cannot be written."""
    try:
        path.write_text(render_html(result, data), encoding="utf-8")
    except OSError as error:
        raise Misconfigured(f"the report cannot be written to {path} (--report): {error.strerror}") from None


def render_html(result: DemoResult, data: DataSet) -> str:
    """Render the whole report as one page that loads nothing from elsewhere."""
    promises = result.broken_promises()
    verdict = (
        '<p class="good">Everything adds up.</p>'
        if not promises
        else '<p class="bad">This does not add up:</p><ul>'
        + "".join(f"<li>{html.escape(one)}</li>" for one in promises)
        + "</ul>"
    )
    body = [
        f"<h1>{html.escape(result.data)}, from stream to scores</h1>",
        f"<p>{html.escape(summary(result))}</p>",
        verdict,
        "<h2>Where everything went</h2>",
        _table(("", "count"), [(name, f"{count:,}") for name, count in accounts(result)]),
        "<h2>From publish to searchable</h2>",
        *(f"<p>{html.escape(one)}</p>" for one in freshness_words(result)),
        _freshness_plot(result),
        "<h2>Scored first, then learned</h2>",
        f"<p>{html.escape(PREQUENTIAL_WORDS)}</p>",
        _table(("", *METRIC_HEADS), metric_rows(result)),
        _table(("GAUC gained", "over", "difference", "95 % interval"), interval_rows(result)),
        _prequential_plot(result),
        "<h2>New items and what the center holds nearest to them</h2>",
        _neighbours(result, data),
        "<h2>Broken events and why they were refused</h2>",
        f"<p>{result.letters.expected:,} events were broken on purpose.</p>",
        _table(("topic and reason", "dead letters"), [(k, f"{n:,}") for k, n in result.letters.by_reason.items()]),
        "<h2>What to know when reading this</h2>",
        "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in statements(result)) + "</ul>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>mimstream demo</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def print_report(result: DemoResult, path: Path, console: Console) -> None:
    """Print the same on the terminal."""
    console.print(Text.assemble((escaped(result.data), "bold"), f": {summary(result)}"))
    print_table(("", "count"), [(name, f"{count:,}") for name, count in accounts(result)], console=console)
    for one in freshness_words(result):
        console.print(Text(one))
    print_table(("", *METRIC_HEADS), metric_rows(result), console=console)
    print_table(("GAUC gained", "over", "difference", "95 % interval"), interval_rows(result), console=console)
    letters = [(kind, f"{number:,}") for kind, number in result.letters.by_reason.items()]
    print_table(("topic and reason", "dead letters"), letters, console=console)
    for one in statements(result):
        console.print(Text(escaped(one)))
    for one in result.broken_promises():
        console.print(Text.assemble(("does not add up:", "bold red"), f" {escaped(one)}"))
    console.print(Text(escaped(f"report: {path}")))


PREQUENTIAL_WORDS = (
    "Every impression was scored by the model as it stood before anything was learned from it. All three models saw "
    "the same rows in the same order. GAUC is the AUC within a user, averaged over users by their impressions."
)
METRIC_HEADS = ("bucket", "GAUC", "AUC", "log-loss", "impressions", "users")


def summary(result: DemoResult) -> str:
    """One sentence about the run."""
    load = result.load
    return (
        f"{result.items_published:,} items and {result.behaviours_sent:,} behaviours in "
        f"{result.wall_seconds:.0f} s; {result.items_per_second:.0f} items per second were encoded meanwhile; "
        f"{result.releases} releases, {len(load.weights)} of them seen in {load.requests:,} answers at "
        f"{load.per_second:.0f} requests per second, {len(load.failures)} failed."
    )


def accounts(result: DemoResult) -> list[tuple[str, int]]:
    """What came in and where it went."""
    return [
        ("items published", result.items_published),
        ("items encoded", result.items_encoded),
        ("items that a search finds", result.items_searchable),
        ("items dead-lettered", result.letters.items),
        ("behaviours sent", result.behaviours_sent),
        ("behaviours stored for serving", result.behaviours_stored),
        ("behaviours trained", result.accounts["trained"]),
        ("behaviours late", result.accounts["late"]),
        ("behaviours duplicate", result.accounts["duplicate"]),
        ("behaviours dead-lettered", result.letters.behaviours),
        ("behaviours pending (last, unfinished batch)", result.accounts["pending"]),
    ]


def freshness_words(result: DemoResult) -> list[str]:
    """Publish to searchable, of single items and in the flood, with what stands behind the figures."""
    live, flood = _percentile_words(result.live_ms()), _percentile_words(result.freshness_ms())
    said = []
    if live is not None:
        said.append(
            f"One item at a time: {live} over {len(result.live.found_at):,} new items, published at "
            f"{result.live_per_second:g} per second after the replay, with nothing else to do."
        )
    if flood is not None:
        said.append(
            f"In the flood of the replay: {flood} over {len(result.freshness.found_at):,} items. The replay publishes "
            "as fast as the index worker keeps up, so most of this is waiting in the queue that it keeps full."
        )
    if not said:
        return ["No item was probed."]
    return [
        *said,
        "Both run from the broker's acknowledgement until a search finds the item, looked at every "
        f"{result.freshness.resolution_ms:.0f} ms. {result.backend}.",
    ]


def _percentile_words(found: dict[str, float | None]) -> str | None:
    if found["p50"] is None:
        return None
    return ", ".join(f"{share} {_duration(milliseconds)}" for share, milliseconds in found.items() if milliseconds)


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1_000 else f"{milliseconds / 1_000:.1f} s"


def metric_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Model, bucket, figures; a dash where a bucket is too small to say anything."""
    report = result.prequential()
    rows: list[tuple[str, ...]] = []
    for bucket in BUCKETS:
        for variant in VARIANTS:
            found = report[variant][bucket]
            figures = ("-",) * 5
            if found is not None:
                figures = (
                    f"{found['gauc']:.4f}",
                    f"{found['auc']:.4f}",
                    f"{found['logloss']:.4f}",
                    f"{found['impressions']:,}",
                    f"{found['users']:,}",
                )
            rows.append((_NAMES[variant], _NAMES[bucket], *figures))
    return rows


def interval_rows(result: DemoResult) -> list[tuple[str, str, str, str]]:
    """Paired differences; says so where the interval holds 0."""
    rows = []
    for pair, by_bucket in result.intervals().items():
        _, theirs = pair.split("-")
        for bucket, found in by_bucket.items():
            if found is not None:
                doubt = " (holds 0)" if found.low <= 0 <= found.high else ""
                interval = f"[{found.low:+.4f}, {found.high:+.4f}]{doubt}"
                rows.append((_NAMES[bucket], _NAMES[theirs], f"{found.difference:+.4f}", interval))
    return rows


def statements(result: DemoResult) -> list[str]:
    """What a reader must know about where the figures come from."""
    said = [
        f"Data: {result.data}, {result.takes:,} takes, seed {result.seed}.",
        f"Exposures that led to nothing: {result.exposures}.",
        *([f"Of the data set, {result.left_out}."] if result.left_out else []),
        f"Pictures: {result.pictures}",
        f"Encoder {result.encoder_version}; {result.backend}.",
        f"{result.sample_items} vectors of the center were compared with a fresh encode of the same items: smallest "
        f"cosine {result.sample_cosine:.6f}.",
        f"Training rows (ids, labels, negatives, order): {result.rows_sha256[:16]}. Same data and seed, same rows.",
        "An impression that defines its item's publish time is in no age bucket; items of the first 24 hours are the "
        "catalogue; items that the user had taken before are in a bucket of their own only.",
    ]
    small = [_NAMES[bucket] for bucket, found in result.prequential()["ciubm"].items() if found is None]
    if small:
        said.append(
            "Too small to say anything (under 500 impressions or 100 users with both labels): " + "; ".join(small) + "."
        )
    return said


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", heads) + "".join(line("td", row) for row in rows) + "</table>"


def _neighbours(result: DemoResult, data: DataSet) -> str:
    position = {item_id: place for place, item_id in enumerate(data.item_ids)}
    parts = []
    for shown in result.neighbours:
        known = [(shown.item_id, "new")] + [(item_id, f"{cosine:.3f}") for item_id, cosine in shown.near]
        known = [(item_id, note) for item_id, note in known if item_id in position]
        records = [data.records(position[item_id], position[item_id] + 1)[0] for item_id, _ in known]
        figures = [
            _figure(picture, record.title or record.item_id, note)
            for (_, note), record, picture in zip(known, records, data.pictures.of(records), strict=True)
        ]
        parts.append('<div class="near">' + "".join(figures) + "</div>")
    return "".join(parts) or "<p>None were published late in this stream.</p>"


def _figure(picture: bytes | None, title: str, note: str) -> str:
    kind = "new" if note == "new" else "old"
    image = '<div class="none"></div>'
    if picture is not None:
        mime = (
            "image/png" if picture.startswith(b"\x89PNG") else "image/webp" if picture[:4] == b"RIFF" else "image/jpeg"
        )
        image = f'<img alt="" src="data:{mime};base64,{base64.b64encode(picture).decode()}">'
    caption = f"<b>{html.escape(note)}</b> {html.escape(title[:60])}"
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _freshness_plot(result: DemoResult) -> str:
    if len(result.freshness.found_at) < 2:
        return ""
    figure, axes = _axes()
    seconds, milliseconds = zip(*sorted(result.freshness.found_at), strict=True)
    axes.scatter(seconds, milliseconds, s=9, color=_COLOURS["ciubm"], linewidths=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the first probe of the replay")
    axes.set_ylabel("publish to searchable, ms")
    return as_image(figure)


def _prequential_plot(result: DemoResult) -> str:
    points = result.gauc_over_time()
    if not points:
        return "<p>Too few impressions for a curve.</p>"
    figure, axes = _axes()
    when = [datetime.fromtimestamp(moment, UTC) for moment, _ in points]
    for variant in VARIANTS:
        axes.plot(
            when, [gauc[variant] for _, gauc in points], marker="o", color=_COLOURS[variant], label=_NAMES[variant]
        )
    axes.set_ylabel("GAUC of each twelfth of the stream")
    axes.legend(frameon=False)
    figure.autofmt_xdate()
    return as_image(figure)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import, and needed by the demo alone

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")  # readable when a phone shrinks it
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
