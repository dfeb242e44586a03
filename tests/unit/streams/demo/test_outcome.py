"""What the demo reports, and when it says that something does not add up."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from schemas.errors import Misconfigured
from streams.demo.audit import Letters
from streams.demo.freshness import FreshnessReport
from streams.demo.load import LoadReport
from streams.demo.outcome import BUCKETS, VARIANTS, percentiles
from streams.demo.report import print_report, render_html, write_html
from tests.factories.demo import make_result, scored_rows
from tests.factories.offline_folders import START, write
from trainer.datasets.folder import DataSet, open_data_set

STABLE_KEYS = {
    "items_published", "items_encoded", "items_searchable", "items_dead_lettered", "behaviours_sent",
    "behaviours_stored", "behaviours_trained", "behaviours_late", "behaviours_duplicate", "behaviours_dead_lettered",
    "behaviours_pending", "freshness_ms", "items_per_second", "releases", "releases_served", "prequential",
    "wall_seconds", "report",
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    folder, titles = tmp_path / "set", ["one", "<script>alert(1)</script>", "three"]
    write(folder, "items", item_id=["i1", "i2", "i3"], title=titles, publish_ts=[START + 1, START + 2, START + 3])
    write(folder, "images", item_id=["i3"], image=[b"\x89PNG picture"])
    return open_data_set(folder, behaviours=False)


def test_json_has_every_stable_key_and_can_be_written() -> None:
    document = json.loads(json.dumps(make_result().to_json("r.html"), allow_nan=False))
    assert set(document) > STABLE_KEYS
    assert document["items_per_second"] == 2.0
    assert document["releases_served"] == 2
    assert document["freshness_ms"] == {"p50": 124.5, "p95": 146.55, "p99": 148.51}
    assert document["freshness_live_ms"] == {"p50": 209.5, "p95": 218.05, "p99": 218.81}
    assert document["freshness_live"] == {"per_second": 2.0, "probes": 20}
    assert set(document["prequential"]) == set(VARIANTS)
    for buckets in document["prequential"].values():
        assert set(buckets) == set(BUCKETS)
        assert set(buckets["overall"]) == {"auc", "gauc", "logloss", "impressions", "users"}
        assert buckets["retaken"] is None  # 30 impressions say nothing


def test_intervals_are_paired_and_reproducible() -> None:
    first, again = make_result().intervals(), make_result().intervals()
    assert first == again
    gain = first["ciubm-din"]["overall"]
    assert gain is not None and 0 < gain.low < gain.difference < gain.high
    none = make_result(scored=scored_rows(better=0.0)).intervals()["ciubm-ciubm_shuffled"]["overall"]
    assert none is not None and none.low < 0 < none.high


def test_a_run_without_scores_reports_nulls() -> None:
    document = make_result(scored=None).to_json("r.html")
    assert document["prequential"]["ciubm"] == dict.fromkeys(BUCKETS)
    assert document["intervals"]["ciubm-din"]["overall"] is None


def test_what_adds_up_breaks_no_promise() -> None:
    assert make_result().broken_promises() == []


BALANCED = dict(make_result().accounts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"items_encoded": 9, "items_searchable": 9}, "12 items were published, but 9 were encoded and 2"),
        ({"items_searchable": 9}, "10 items were encoded, but 9 can be found"),
        ({"behaviours_stored": 595}, "595 are stored"),
        ({"accounts": BALANCED | {"trained": 579}}, "600 behaviours were sent, but the trainer's accounts are"),
        ({"accounts": BALANCED | {"dead_lettered": 5, "late": 2}}, "the trainer counted 5"),
        ({"letters": Letters(2, 6, {}, 8, ["items/0/3: bad_image, no letter came"], [])}, "no letter came"),
        ({"letters": Letters(2, 6, {}, 8, [], ["items/0/4: no_key"])}, "an event that is good was refused"),
        ({"load": LoadReport(9, ["timeout"], [], {}, 1.0)}, "1 score requests failed, the first: timeout"),
        ({"freshness": FreshnessReport([], lost=2)}, "2 probed items could not be found"),
        ({"live": FreshnessReport([], lost=1)}, "1 probed items could not be found"),
        ({"sample_cosine": 0.9}, "cosine 0.90000 to a fresh encode"),
    ],
)
def test_each_broken_promise_is_said(changes: dict[str, object], said: str) -> None:
    broken = make_result(**changes).broken_promises()
    assert len(broken) == 1 and said in broken[0]


def test_html_stands_alone_shows_pictures_and_escapes_titles(data: DataSet) -> None:
    page = render_html(make_result(), data)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("data:image/svg+xml;base64,") == 2 and "data:image/png;base64," in page
    assert "http://" not in page
    for said in ("Everything adds up", "consistency level Strong", "drawn by seed 0"):
        assert said in page


def test_html_says_what_does_not_add_up(data: DataSet) -> None:
    page = render_html(make_result(items_searchable=3), data)
    assert "10 items were encoded, but 3 can be found" in page
    assert "Everything adds up" not in page


def test_an_interval_that_holds_zero_is_marked(data: DataSet) -> None:
    page = render_html(make_result(scored=scored_rows(better=0.0)), data)
    assert "(holds 0)" in page
    assert "(holds 0)" not in render_html(make_result(), data).split("items under 1 h old")[0]


def test_the_terminal_shows_the_same_figures(data: DataSet, tmp_path: Path) -> None:
    result = make_result()
    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    print_report(result, tmp_path / "r.html", console)
    text = console.export_text()
    console.file.close()
    found = result.prequential()["ciubm"]["overall"]
    assert found is not None and f"{found['gauc']:.4f}" in text
    assert "p95 147 ms" in text and "behaviours not_json" in text
    assert "p50 210 ms" in text and "2 per second" in text  # single items stand beside the flood
    assert text.index("p50 210 ms") < text.index("p95 147 ms")


@pytest.mark.parametrize("width", [40, 80])
def test_the_report_fits_a_terminal_and_cuts_no_word(width: int, data: DataSet, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(width=width, file=out, force_terminal=True, color_system=None)
    result = make_result(data="s", encoder_version="e")
    print_report(result, tmp_path / "r.html", console)
    lines = [line for line in out.getvalue().splitlines() if str(tmp_path)[:20] not in line]
    assert max(map(len, lines)) <= width
    figures = result.prequential()["ciubm"]["overall"]
    assert figures is not None and f"{figures['gauc']:.4f}" in out.getvalue()


def test_the_page_fits_a_phone_and_its_prose_has_no_dashes(data: DataSet) -> None:
    page = render_html(make_result(), data)
    assert "name='viewport'" in page and "overflow-x: auto" in page
    prose = [html.unescape(one) for one in re.findall(r"<(?:p|li)>(.*?)</", page)]
    assert len(prose) > 8
    assert [one for one in prose if re.search(r"\s[-\u2013\u2014]\s|[\u2013\u2014]", one)] == []


def test_a_report_that_cannot_be_written_names_the_option(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="--report"):
        write_html(make_result(), data, tmp_path / "nowhere" / "report.html")


def test_no_measurements_give_null_percentiles() -> None:
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}
