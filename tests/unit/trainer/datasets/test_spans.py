"""Spans of a folder against plain loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.factories.offline_folders import DAY, read_protocol, write_stream
from trainer.datasets.spans import BehaviourLog


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
