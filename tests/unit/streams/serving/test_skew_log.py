"""Which rows of a request are logged, and how often."""

from __future__ import annotations

import numpy as np

from schemas.item_states import StateHead
from schemas.skew import ServedRows, SkewRecord
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.serving.skew_log import SkewLog
from tests.factories.serving import FEATURES

HEAD = StateHead(number=3, before=7, left=0, log="log")
NAMES = [f"i{n}" for n in range(20)]
EVEN = np.arange(20) % 2 == 0


class Logging:
    def __init__(self, *, share: float = 1.0) -> None:
        self.now = 0.0
        self.log = SkewLog(
            FEATURES.version,
            share=share,
            broker=BrokerConfig(),
            topics=TopicsConfig(),
            seed=0,
            clock=lambda: self.now,
        )

    def put(self, held_B: np.ndarray = EVEN, *, now: int = 50, query: str | None = None) -> None:
        """Rows of which the features and the probability tell the item's number."""
        values_BF = np.repeat(np.arange(20.0)[:, None], 2, axis=1).astype(np.float32)
        self.log.put("r1", HEAD, now, NAMES, ["h"], [40], values_BF, np.arange(20) / 20, held_B=held_B, query=query)

    @property
    def logged(self) -> list[ServedRows]:
        records = [SkewRecord.model_validate_json(value).served for value in self.log.waiting]
        return [served for served in records if served is not None]


def test_a_row_is_logged_with_its_own_features_and_probability() -> None:
    logging = Logging()
    logging.put()
    (served,) = logging.logged
    numbers = [NAMES.index(name) for name in served.targets]
    assert len(set(numbers)) == 4 and not any(number % 2 for number in numbers)
    assert np.frombuffer(served.values, "<f4").tolist() == np.repeat(numbers, 2).tolist()
    assert served.probabilities == [number / 20 for number in numbers]
    assert (served.release_id, served.number, served.before, served.now) == ("r1", 3, 7, 50)
    assert logging.log._came.is_set(), "it is sent at once"


def test_a_row_is_logged_with_what_was_searched_and_without_its_words() -> None:
    logging = Logging()
    logging.put(query="0" * 32)
    assert logging.logged[0].query == "0" * 32 and b"query_text" not in logging.log.waiting[0]


def test_requests_are_logged_a_tenth_of_a_second_apart_and_one_without_such_items_is_none() -> None:
    logging = Logging()
    logging.put(np.zeros(20, bool))
    assert logging.log.chooses(HEAD) and not logging.log.chooses(None)
    logging.put()
    assert not logging.log.chooses(HEAD)
    logging.now = 0.11
    assert logging.log.chooses(HEAD) and len(logging.logged) == 1


def test_the_share_of_requests_is_logged_that_was_asked_for() -> None:
    logging = Logging(share=0.25)
    assert 200 < sum(logging.log.chooses(HEAD) for _ in range(1_000)) < 300


def test_the_newest_records_wait_for_a_broker_that_is_away() -> None:
    logging = Logging()
    for now in range(130):
        logging.put(now=now)
    assert [served.now for served in logging.logged] == [*range(30, 130)]
