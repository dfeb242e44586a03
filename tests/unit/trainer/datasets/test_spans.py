"""Spans of a folder against plain loops."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.factories.offline_folders import DAY, START, read_protocol, write, write_days, write_stream
from trainer.csft.pairs import NoPair
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog, Span
from trainer.samples.numbering import FeatureNumbers


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> BehaviourLog:
    folder: Path = write_stream(tmp_path_factory.mktemp("spans"), users=60, items=80, takes=1_500, seed=3)
    found = read_protocol(folder)[0].log
    return replace(found, held_out=np.arange(len(found.held_out)) % 7 == 3)


def test_popularity_is_that_of_the_last_day_before_the_span_without_held_out_items(log: BehaviourLog) -> None:
    span = log.test
    before = np.sort(log.ts[log.ts < span.start])
    since = min(span.start - DAY, int(np.quantile(before, 0.94)))
    expected = np.zeros(len(log.held_out), np.int64)
    for ts, item in zip(log.ts, log.item, strict=True):
        if since <= ts < span.start and not log.held_out[item]:
            expected[item] += 1
    assert expected.sum() > 20
    assert log.recent_takes(span).tolist() == expected.tolist()


def test_cold_items_are_held_out_or_not_taken_before_the_span_and_padding_is_neither(log: BehaviourLog) -> None:
    span = log.validation
    taken = {int(item) for ts, item in zip(log.ts, log.item, strict=True) if ts < span.start}
    items = range(1, len(log.held_out))
    expected = [False, *(bool(log.held_out[item]) or item not in taken for item in items)]
    assert log.cold(span).tolist() == expected and 0 < sum(expected) < len(expected)


def test_published_items_are_those_before_the_end_of_the_span(log: BehaviourLog) -> None:
    span = log.learn
    assert log.published(span).tolist() == [False, *(int(ts) < span.stop for ts in log.data.publish_ts)]
    assert 0 < log.published(span).sum() < len(log.data.publish_ts)
    end = int(log.data.publish_ts[4])
    assert log.published(Span(0, end)).sum() == (log.data.publish_ts < end).sum(), "not at its end"


def test_a_span_holds_its_first_second_and_not_its_end() -> None:
    assert Span(5, 8).holds(np.array([4, 5, 7, 8])).tolist() == [False, True, True, False]


def test_spans_are_shares_of_the_events_in_order_and_the_test_runs_to_the_end(log: BehaviourLog) -> None:
    ordered = np.sort(log.ts)
    at = {share: int(ordered[round(share * len(ordered))]) for share in (0.5, 0.7, 0.8)}
    assert log.learn == Span(int(ordered[0]), at[0.5])
    assert log.validation == Span(at[0.7], at[0.8])
    assert log.test.start == at[0.8] and log.test.holds(ordered[-1:]).all()
    assert log.boundary(1.0) == ordered[-1]
    few = replace(log, ts=np.array([70, 10, 20, 60, 50, 30, 40]))
    assert [few.boundary(share) for share in (0.0, 0.5, 0.7, 0.8, 1.0)] == [10, 50, 60, 70, 70]


def test_takes_of_just_a_day_before_the_span_are_recent(log: BehaviourLog) -> None:
    start = 30 * DAY
    ts = np.array([start - DAY - 1, start - DAY, *[start - 1] * 100, start])
    few = replace(log, ts=ts, item=np.array([1, 2, *[3] * 100, 4]), held_out=np.zeros(81, bool))
    assert few.recent_takes(Span(start, start + 1))[:5].tolist() == [0, 0, 1, 100, 0]


def test_what_is_liked_has_a_label_above_nought_and_held_out_items_are_marked_by_the_set(tmp_path: Path) -> None:
    write(tmp_path, "items", item_id=[*"abc"], title=[*"abc"], publish_ts=[START] * 3, cold_holdout=[0, 1, 0])
    rows = {"user_id": ["u"] * 3, "item_id": [*"abc"], "ts": [START + 1, START + 2, START + 3]}
    write(tmp_path, "interactions", label=[2.0, -1.0, 0.0], rating=[5, 1, 3], **rows)
    log = BehaviourLog.of(open_data_set(tmp_path, attributes=("cold_holdout",)), tmp_path)
    assert log.liked.tolist() == [True, False, False] and log.item.tolist() == [1, 2, 3]
    assert log.held_out.tolist() == [False, False, True, False]
    assert not BehaviourLog.of(open_data_set(tmp_path), tmp_path).held_out.any()


def test_pairs_follow_each_other_second_by_second_from_the_start_of_the_span_up_to_its_end(tmp_path: Path) -> None:
    items = [*"abcdef"]
    write(tmp_path, "items", item_id=items, title=items, publish_ts=[START] * 6)
    ts = [START + second for second in (5, 6, 7, 8, 9, 10)]
    write(tmp_path, "interactions", user_id=["u"] * 6, item_id=items, ts=ts, label=[1, 1, 0, 1, 1, 1], rating=[3] * 6)
    write(tmp_path, "exposures", user_id=["u"], item_id=["f"], ts=[START + 7])
    log = BehaviourLog.of(open_data_set(tmp_path), tmp_path)
    assert not log.data.day_resolution
    numbers = FeatureNumbers(items, items)
    pairs = log.pairs(Span(START + 5, START + 10), numbers, history_length=2, seed=0)
    assert [(pair.anchor, pair.row.item, pair.passed_over) for pair in pairs] == [
        ((1,), 2, ()),
        ((1, 2), 4, (3, 6)),
        ((2, 4), 5, (3, 6)),
    ]
    later = log.pairs(Span(START + 6, START + 10), numbers, history_length=2, seed=0)
    assert [(pair.anchor, pair.row.item) for pair in later] == [((2,), 4), ((2, 4), 5)]


def test_questions_ask_for_the_next_liked_item_that_is_new_given_the_earlier_ones(log: BehaviourLog) -> None:
    rng, span = np.random.default_rng(0), log.validation
    liked = rng.random(len(log.ts)) < 0.7
    log = replace(log, item=rng.integers(1, 30, len(log.ts)))  # users meet items again
    asked = replace(log, liked=liked).next_questions(span)
    order = sorted(range(len(log.ts)), key=lambda row: (log.ts[row], row))
    expected = []
    for row in order:
        if not (span.start <= log.ts[row] < span.stop and liked[row]):
            continue
        before = [one for one in order if log.user[one] == log.user[row] and log.ts[one] < log.ts[row]]
        met = {int(log.item[one]) for one in before}
        earlier = [int(log.item[one]) for one in before if liked[one]]
        if earlier and int(log.item[row]) not in met:
            expected.append((earlier[-10:][::-1], int(log.item[row]), sorted(met)))
    found = [
        (
            [item for item in asked.anchors_QL[q].tolist() if item],
            int(asked.target_Q[q]),
            asked.known[asked.known_start_Q[q] : asked.known_start_Q[q + 1]].tolist(),
        )
        for q in range(len(asked))
    ]
    assert found == expected and len(found) > 30
    assert log.basket_questions(span) is None  # its times are finer than days


def test_pairs_leave_out_what_is_held_out_or_was_not_liked(log: BehaviourLog) -> None:
    numbers = FeatureNumbers(log.data.item_ids, log.data.item_ids)
    rng, reasons = np.random.default_rng(1), Counter[NoPair]()
    liked = replace(log, liked=rng.random(len(log.ts)) < 0.6)
    pairs = liked.pairs(log.test, numbers, history_length=10, seed=0, no_pair=reasons)
    good = {(int(u), int(i)) for u, i, yes in zip(log.user, log.item, liked.liked, strict=True) if yes}
    users = {name: n for n, name in enumerate(log.data.user_ids)}
    assert len(pairs) > 20 and reasons[NoPair.ITEM_NOT_LEARNED] > 0
    for pair in pairs:
        assert not log.held_out[[pair.row.item, *pair.anchor, *pair.passed_over]].any()
        assert (users[pair.row.user_id], pair.row.item) in good
        assert log.test.holds(np.array([pair.row.second])).all()


def test_baskets_ask_for_each_item_given_its_neighbour_of_the_same_day_and_user(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = write_days(tmp_path_factory.mktemp("days"), users=30, items=20)
    log = read_protocol(folder)[0].log
    # few users, so that baskets are large and hold an item twice
    log = replace(log, user=log.user % 5, liked=np.arange(len(log.ts)) % 4 > 0)
    asked, span = log.basket_questions(log.test), log.test
    assert asked is not None and len(asked) > 10
    baskets: dict[tuple[int, int], list[int]] = {}
    for ts, user, item, liked in zip(log.ts.tolist(), log.user.tolist(), log.item.tolist(), log.liked, strict=True):
        if span.start <= ts < span.stop and liked:
            basket = baskets.setdefault((ts, user), [])
            basket.extend([item] if item not in basket else [])
    expected = []
    for items in baskets.values():
        for place, item in enumerate(items if len(items) > 1 else []):
            other = items[place - 1] if place else items[1]
            expected.append((other, item, other))
    found = zip(asked.anchors_QL[:, 0].tolist(), asked.target_Q.tolist(), asked.known.tolist(), strict=True)
    assert sorted(found) == sorted(expected)


def test_where_only_days_are_known_a_span_ends_at_the_midnight_nearest_to_its_share(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    log = read_protocol(write_days(tmp_path_factory.mktemp("nearest"), users=30, items=20))[0].log
    rows = np.repeat(np.arange(4), [10, 50, 30, 10])  # days begin at 0, 10, 60 and 90 % of the events
    start = int(log.ts.min())
    few = replace(log, ts=start + rows * DAY, user=rows, item=rows + 1, liked=rows >= 0)
    shares = {0.0: 0, 0.04: 0, 0.06: 1, 0.34: 1, 0.36: 2, 0.5: 2, 0.74: 2, 0.76: 3, 1.0: 3}
    assert {share: (few.boundary(share) - start) // DAY for share in shares} == shares
    assert few.test == Span(start + 3 * DAY, start + 4 * DAY)


def test_where_only_days_are_known_pairs_lie_at_the_seconds_of_their_seed(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    log = read_protocol(write_days(tmp_path_factory.mktemp("seeds"), users=30, items=20))[0].log
    numbers = FeatureNumbers(log.data.item_ids, log.data.item_ids)

    def seconds(seed: int) -> list[tuple[str, int]]:
        return [(one.row.user_id, one.row.second) for one in log.pairs(log.test, numbers, history_length=5, seed=seed)]

    assert seconds(3) == seconds(3) != seconds(4) and len(seconds(3)) > 5
