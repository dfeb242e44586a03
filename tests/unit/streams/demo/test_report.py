"""The words and rows of the demo's report, figure by figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streams.demo.audit import Letters
from streams.demo.freshness import FreshnessReport
from streams.demo.load import LoadReport
from streams.demo.outcome import DemoResult, Intervals, Neighbours
from streams.demo.report import accounts, freshness_words, interval_rows, render_html, statements, summary
from tests.factories.demo import make_result, scored_rows
from tests.factories.offline_folders import START, write
from trainer.datasets.folder import open_data_set
from trainer.metrics import Interval


def test_one_sentence_and_the_accounts_name_each_count_once() -> None:
    result = make_result(
        letters=Letters(2, 6, {}, 8, [], []),
        load=LoadReport(1_200, ["a", "b", "c"], [], {"aa": 1, "bb": 1}, 4.0),
        behaviours_sent=60_000, items_encoded=11, items_searchable=9,
    )  # fmt: skip
    assert summary(result) == (
        "12 items and 60,000 behaviours in 77 s; 2 items per second were encoded meanwhile; 4 releases, 2 of them seen "
        "in 1,200 answers at 300 requests per second, 3 failed."
    )
    assert [count for _, count in accounts(result)] == [12, 11, 9, 2, 60_000, 594, 580, 1, 2, 6, 11]


@pytest.mark.parametrize(("milliseconds", "said"), [(999.4, "999 ms"), (1_000.0, "1.0 s"), (1_250.0, "1.2 s")])
def test_durations_of_a_second_or_more_are_in_seconds(milliseconds: float, said: str) -> None:
    flood, live = (FreshnessReport([(0.0, one)], resolution_ms=50) for one in (5.0, milliseconds))
    words = freshness_words(make_result(freshness=flood, live=live))
    assert words[0].startswith(f"One item at a time: p50 {said}, p95 {said}, p99 {said} over 1 new items, published at")
    assert words[1].startswith("In the flood of the replay: p50 5 ms, p95 5 ms, p99 5 ms over 1 items.")
    nothing = FreshnessReport(resolution_ms=50)
    assert freshness_words(make_result(freshness=nothing, live=nothing)) == ["No item was probed."]
    (flood_alone, _) = freshness_words(make_result(live=nothing))
    assert flood_alone.startswith("In the flood")


class Gained(DemoResult):
    """Of known differences."""

    def intervals(self) -> Intervals:
        touching = {"overall": Interval(0.5, 0.0, 0.75), "under_1h": Interval(-0.5, -0.75, 0.0), "retaken": None}
        return {"ciubm-din": touching, "ciubm-ciubm_shuffled": {"older": Interval(0.5, 0.25, 0.75)}}


def test_an_interval_that_touches_zero_holds_it_and_a_small_bucket_has_no_row() -> None:
    assert interval_rows(Gained(**vars(make_result()))) == [
        ("all first-time impressions", "DIN (ids only)", "+0.5000", "[+0.0000, +0.7500] (holds 0)"),
        ("items under 1 h old", "DIN (ids only)", "-0.5000", "[-0.7500, +0.0000] (holds 0)"),
        ("older items and the catalogue", "CiUBM, vectors shuffled", "+0.5000", "[+0.2500, +0.7500]"),
    ]


def test_buckets_that_are_too_small_are_named() -> None:
    assert statements(make_result())[-1].endswith("both labels): items under 1 h old; items the user had taken before.")
    rows = replace(scored_rows(), age_seconds=np.full(3_000, 10.0), retaken=np.arange(3_000) % 2 == 0)
    assert not any("Too small" in one and "1 h" in one for one in statements(make_result(scored=rows)))


def test_neighbours_are_shown_with_their_pictures_and_by_their_id_where_they_have_no_title(tmp_path: Path) -> None:
    titles = ["x" * 61, None, "three"]
    write(tmp_path, "items", item_id=["i1", "i2", "i3"], title=titles, publish_ts=[START + n for n in range(3)])
    pictures = [b"RIFF and so on", b"\xff\xd8 and so on"]
    write(tmp_path, "images", item_id=["i1", "i3"], image=pictures)
    near = [("unknown", 0.95), ("i1", 0.9), ("i2", 0.8004)]
    result = make_result(scored=None, neighbours=[Neighbours("i3", near)])
    page = render_html(result, open_data_set(tmp_path, behaviours=False))
    shown = page[page.index('<div class="near">') : page.index("<h2>Broken events")]
    captions = [one.split("</figcaption>")[0] for one in shown.split("<figcaption>")[1:]]
    assert captions == ["<b>new</b> three", f"<b>0.900</b> {'x' * 60}", "<b>0.800</b> i2"]
    assert [one[:5] for one in shown.split('<figure class="')[1:]] == ['new">', 'old">', 'old">']
    assert [one.split(";")[0] for one in shown.split("data:image/")[1:]] == ["jpeg", "webp"]
    assert shown.count('<div class="none"></div>') == 1


def test_a_single_probe_makes_no_plot_of_the_flood(tmp_path: Path) -> None:
    write(tmp_path, "items", item_id=["i1"], title=["one"], publish_ts=[START])
    data = open_data_set(tmp_path, behaviours=False)
    for probes, plots in ((1, 0), (2, 1)):
        flood = FreshnessReport([(float(n), 100.0) for n in range(probes)], resolution_ms=50)
        page = render_html(make_result(freshness=flood, scored=None, neighbours=[]), data)
        assert page.count("data:image/svg") == plots
        assert "None were published late" in page and "Too few impressions for a curve" in page
