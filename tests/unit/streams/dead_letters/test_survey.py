"""A survey of letters tells what the whole index would, and keeps no letter."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from schemas.errors import Reason
from schemas.letters import DeadLetter, Handled
from streams.dead_letters.inbox import DeadLetterIndex, Filter, only_open
from streams.dead_letters.survey import Survey

NOW = datetime(2026, 5, 1, tzinfo=UTC)
LETTER = DeadLetter("items", 3, 7, b"k", b"{broken", "decode", Reason.NOT_JSON, "no brace", NOW)


def some_log(seed: int) -> list[DeadLetter | Handled]:
    draw = random.Random(seed)
    log: list[DeadLetter | Handled] = []
    for n in range(200):
        letter = replace(
            LETTER,
            offset=draw.randrange(60),
            reason=draw.choice([Reason.NOT_JSON, Reason.NO_KEY]),
            stage=draw.choice(["decode", "image"]),
            failed_at=NOW + timedelta(seconds=n),
            attempts=draw.randrange(1, 4),
            value=b"x" * draw.randrange(2),
        )
        log.append(letter)
        if draw.random() < 0.2:
            log.append(Handled(letter.letter_key, letter.digest, draw.choice(["dropped", "requeued"]), NOW))  # type: ignore[arg-type]
    return log


def read(log: list[DeadLetter | Handled], *into: Survey | DeadLetterIndex) -> None:
    for offset, record in enumerate(log):
        value = record.value if isinstance(record, DeadLetter) else None
        for one in into:
            one.add(key=record.letter_key, value=value, headers=record.headers(), at=(0, offset))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_handled", [True, False])
def test_the_newest_entries_are_those_of_the_whole_index(seed: int, with_handled: bool) -> None:
    log, index = some_log(seed), DeadLetterIndex()
    wanted = Filter(stage="image")
    survey = Survey(wanted, with_handled=with_handled)
    read(log, index, survey)
    entries = [entry for entry in index.entries() if wanted.admits(entry.newest)]
    expected = entries if with_handled else only_open(entries)
    assert survey.count() == len(expected)
    for most in (1, 7, 1_000):
        found = []
        for _, offset in survey.newest(most):
            letter = log[offset]
            assert isinstance(letter, DeadLetter)
            found.append(survey.entry(letter))
        assert found == expected[-most:]


def test_a_summary_counts_open_and_handled_by_kind_with_first_and_last_failure() -> None:
    later = replace(LETTER, offset=8, failed_at=NOW + timedelta(hours=2), first_failed_at=NOW - timedelta(hours=1))
    other = replace(LETTER, offset=9, reason=Reason.NO_KEY)
    survey = Survey(Filter(), with_handled=False)
    between = replace(LETTER, offset=10, failed_at=NOW + timedelta(hours=1))
    read([LETTER, later, between, other, Handled(other.letter_key, other.digest, "dropped", NOW)], survey)
    kinds = survey.kinds()
    assert list(kinds) == [("items", "decode", "no_key"), ("items", "decode", "not_json")]
    broken = kinds["items", "decode", "not_json"]
    assert (broken.open, broken.handled) == (3, 0)
    assert (broken.first_failed_at, broken.last_failed_at) == (NOW - timedelta(hours=1), NOW + timedelta(hours=2))
    assert (kinds["items", "decode", "no_key"].open, kinds["items", "decode", "no_key"].handled) == (0, 1)
    survey.add(key=b"x", value=b"", headers=[], at=(0, 99))
    assert survey.unreadable == 1


def test_no_value_key_or_detail_is_kept() -> None:
    survey = Survey(Filter(), with_handled=False)
    large = replace(LETTER, value=b"v" * 100_000, key=b"k" * 10_000, detail="d" * 1_000)
    before = sys.getrefcount(large)
    read([large], survey)
    assert sys.getrefcount(large) == before
    assert "vvv" not in repr(vars(survey)) and "kkk" not in repr(vars(survey)) and "ddd" not in repr(vars(survey))
