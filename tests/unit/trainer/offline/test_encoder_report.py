"""Figures of a trained encoder, worked out by hand on a row of items and a log of two days."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encoders.features import ItemFeatures
from encoders.fusion import Views
from tests.factories.offline_folders import DAY, START, write, write_days, write_stream
from trainer.csft.health import Questions
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog, Span
from trainer.offline import encoder_report
from trainer.offline.encoder_report import (
    frozen_vectors,
    geometry_of,
    popularity,
    questions_of,
    recalls,
    recalls_with_popularity,
    table,
)

ITEMS = 120
TEST = Span(START + 2 * DAY, START + 3 * DAY)
R = 0.5**0.5


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> BehaviourLog:
    """On the day before the span items 1 to 49 are taken twice and 50 to 60 once; those from 61 on are cold."""
    folder = tmp_path_factory.mktemp("row")
    names = [f"i{n:03d}" for n in range(1, ITEMS + 1)]
    write(folder, "items", item_id=names, title=names, publish_ts=[START] * ITEMS)
    taken = [*names[:60], *names[:49]]
    ts = [START + DAY + 60 * place for place in range(len(taken))]
    write(folder, "interactions", user_id=[f"u{second}" for second in ts], item_id=taken, ts=ts, label=[1] * len(ts))
    return BehaviourLog.of(open_data_set(folder), folder)


def on_an_arc() -> NDArray[np.float32]:
    """Items are the nearer the nearer their numbers are."""
    at = 0.02 * np.arange(ITEMS + 1)
    rows = np.stack([np.cos(at), np.sin(at)], axis=1).astype(np.float32)
    rows[0] = 0
    return rows


ASKED = {"next": Questions.of([([10], 50, {10}), ([10], 52, {10}), ([70], 100, {70})])}
"""48 items are nearer to 10 than 50 is, and 50 nearer than 52; 58 to 70 than 100, of which 38 are cold."""
BY_CONTENT = {"k": 50, "questions": 3, "cold_questions": 1, "all": 1 / 3, "cold": 0.0, "cold_among_cold": 1.0}


def test_recall_is_at_fifty_with_the_cold_items_of_the_span(log: BehaviourLog) -> None:
    assert recalls(on_an_arc(), log, TEST, ASKED) == {"next": BY_CONTENT}
    assert recalls(on_an_arc(), log, Span(START, START), ASKED)["next"]["cold_questions"] == 3, "nothing was taken"


def test_popularity_ranks_by_the_takes_before_the_span(log: BehaviourLog) -> None:
    asked = {"next": Questions.of([([10], 30, {10}), ([10], 55, {10}), ([70], 100, {70})])}
    assert popularity(log, TEST, asked) == {"next": BY_CONTENT}, "of the eleven taken once a half comes before 55"


def test_popularity_added_back_counts_as_far_as_training_left_it_out(log: BehaviourLog) -> None:
    def found(temperature: float, strength: float) -> dict[str, Any]:
        return recalls_with_popularity(on_an_arc(), log, TEST, asked, temperature=temperature, strength=strength)

    asked = ASKED | {"far": Questions.of([([110], 30, {110})])}
    by_content = {"next": BY_CONTENT, "far": {**BY_CONTENT, "questions": 1, "cold_questions": 0, "all": 0.0}}
    by_content["far"] |= {"cold": None, "cold_among_cold": None}
    assert found(1e6, 1.0) == by_content, "nothing was left out"
    assert found(1e-6, 0.0) == by_content, "the cosines alone are told apart"
    assert found(1e6, 0.0)["far"]["all"] == 1.0, "the much taken ones come first"


def test_questions_of_baskets_are_asked_where_only_days_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_days(tmp_path / "days")
    by_day = BehaviourLog.of(open_data_set(folder), folder)
    whole = questions_of(by_day, by_day.test)
    assert list(whole) == ["next", "basket"] and min(map(len, whole.values())) > 10
    assert questions_of(by_day, Span(START, START + DAY)).keys() == {"basket"}, "nobody took anything before"
    monkeypatch.setattr(encoder_report, "MOST_QUESTIONS", 9)
    some, others = questions_of(by_day, by_day.test), questions_of(by_day, by_day.test, seed=1)
    assert [len(one) for one in some.values()] == [9, 9]
    assert all(some[kind].target_Q.tolist() != others[kind].target_Q.tolist() for kind in some)
    stream = write_stream(tmp_path / "stream", users=60, items=40, takes=400)
    to_the_second = BehaviourLog.of(open_data_set(stream), stream)
    assert list(questions_of(to_the_second, to_the_second.test)) == ["next"]


# ---- frozen vectors --------------------------------------------------------------------------------------------------


def three_items() -> ItemFeatures:
    """The first has no picture and the last no title."""
    return ItemFeatures(
        text_NT=np.array([[2, 0], [0, 3], [0, 0]], np.float32),
        image_NI=np.array([[0, 0], [4, 0], [0, 1]], np.float32),
        has_text_N=np.array([True, True, False]),
        has_image_N=np.array([False, True, True]),
        category_N2=np.full((3, 2), -1),
        year_N=np.full(3, np.nan, np.float32),
        price_N=np.full(3, np.nan, np.float32),
        words_NA=np.full((3, 2), -1),
    )


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        pytest.param({}, [[R, -R, 0, 0], [-0.5, 0.5, 0.5, -0.5], [0, 0, -R, R]], id="centred by all that have it"),
        pytest.param({"image": False}, [[R, -R], [-R, R], [0, 0]], id="titles alone"),
        pytest.param({"text": False}, [[0, 0], [R, -R], [-R, R]], id="pictures alone"),
        pytest.param(
            {"centred_by_N": [True, True, False]},
            [[R, -R, 0, 0], [-R, R, 0, 0], [0, 0, -R, R]],
            id="centred by those of the first two that have it",
        ),
        pytest.param(
            {"centred_by_N": [True, False, False]},
            [[0, 0, 0, 0], [-0.5, 0.5, R, 0], [0, 0, 0, 1]],
            id="not centred where none of those has it",
        ),
    ],
)
def test_frozen_vectors_are_the_centred_directions_of_each_side(more: dict[str, Any], rows: list[list[float]]) -> None:
    if "centred_by_N" in more:
        more = {"centred_by_N": np.array(more["centred_by_N"])}
    found = frozen_vectors(three_items(), **more)
    np.testing.assert_allclose(found, [[0.0] * len(rows[0]), *rows], atol=1e-6)


# ---- geometry and table ----------------------------------------------------------------------------------------------


def test_geometry_is_that_of_the_items_with_the_first_kind_of_question() -> None:
    own = torch.cat([torch.zeros(1, 30), torch.eye(30)])
    views = Views(image_ND=-own, title_ND=own, fused_ND=own)
    asked = {"next": Questions.of([([1], 2, {1})]), "basket": Questions.of([([1], 1, {1})])}
    found = geometry_of(views, asked)
    assert (found.mean_pairwise_cosine, found.alignment, found.title_finds_image) == (0.0, 2.0, 0.0)
    assert geometry_of(views, {"basket": asked["basket"]}).alignment == 0.0
    assert geometry_of(views, {}).alignment is None
    same = torch.cat([torch.zeros(1, 30), torch.eye(30)[:1].expand(30, 30)])
    assert geometry_of(Views(same, same, same), {}).mean_pairwise_cosine == pytest.approx(1.0), "without padding"


def test_table_has_a_line_for_each_vector_and_kind_in_a_fixed_order() -> None:
    def row(*figures: float | None) -> dict[str, float | None]:
        return dict(zip(("all", "cold", "cold_among_cold"), figures, strict=True))

    report = {
        "trained_with_popularity": {"next": row(0.5, 0.25, 0.75)},
        "trained": {"next": row(0.1234, 0.0, None), "basket": row(1.0, None, None)},
        "trained_nested": {"next": row(0.2, 0.3, 0.4)},
        "frozen": {"next": row(0.01, 0.02, 0.03)},
        "popularity": {"next": row(0.4, 0.5, 0.6)},
    }
    assert table(report).splitlines() == [
        "recall@50               questions                all    cold  cold among cold",
        "popularity              next                   0.400   0.500            0.600",
        "frozen                  next                   0.010   0.020            0.030",
        "trained                 next                   0.123   0.000                -",
        "trained                 basket                 1.000       -                -",
        "trained_nested          next                   0.200   0.300            0.400",
        "trained_with_popularity next                   0.500   0.250            0.750",
    ]
