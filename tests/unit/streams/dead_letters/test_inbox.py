"""Dead letters as a person sees them, and what is decided about one that is to be sent again."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from schemas.errors import Reason
from schemas.letters import DeadLetter, Handled, RequeueHeaders
from streams.dead_letters.inbox import DeadLetterIndex, Filter, only_open
from streams.dead_letters.requeue import LaterRecord, RequeueDecision, decide

NOW = datetime(2026, 5, 1, tzinfo=UTC)
LETTER = DeadLetter("items", 3, 7, b"k", b"{broken", "decode", Reason.NOT_JSON, "no brace", NOW)


def index_of(*records: DeadLetter | Handled) -> DeadLetterIndex:
    index = DeadLetterIndex()
    for offset, record in enumerate(records):
        value = record.value if isinstance(record, DeadLetter) else None
        index.add(key=record.letter_key, value=value, headers=record.headers(), at=(0, offset))
    return index


def handled(letter: DeadLetter, action: str = "dropped") -> Handled:
    return Handled(letter.letter_key, letter.digest, action, NOW)  # type: ignore[arg-type]


def test_a_letter_survives_its_headers_with_what_happened_before() -> None:
    again = replace(LETTER, offset=9, attempts=2, failed_at=NOW + timedelta(hours=1)).after(
        RequeueHeaders.of(LETTER).headers()
    )
    assert (again.attempts, again.first_failed_at, again.requeued_from) == (3, NOW, "items/3/7")
    assert DeadLetter.from_record(again.value, again.headers()) == again
    third = replace(LETTER, offset=11).after(RequeueHeaders.of(again).headers())
    assert (third.attempts, third.first_failed_at, third.requeued_from) == (4, NOW, "items/3/9")


@pytest.mark.parametrize(
    "headers",
    [[], [("requeued-from", b"x")], [("requeued-from", b"x"), ("attempts", b"many"), ("first-failed-at", b"?")]],
)
def test_headers_that_are_not_ours_change_nothing(headers: list[tuple[str, bytes]]) -> None:
    assert LETTER.after(headers) == LETTER


def test_letters_of_one_record_are_one_entry_with_first_and_last_failure() -> None:
    later = replace(LETTER, stage="image", reason=Reason.BAD_IMAGE, failed_at=NOW + timedelta(hours=2), attempts=3)
    (entry,) = index_of(LETTER, later).entries()
    assert (entry.id, entry.letters, entry.attempts, entry.newest.stage) == ("items/3/7", 2, 3, "image")
    assert (entry.first_failed_at, entry.newest.failed_at) == (NOW, NOW + timedelta(hours=2))
    assert (entry.value_bytes, entry.newest.value, entry.at) == (7, None, (0, 1))


def test_a_dropped_letter_stays_dropped_when_its_record_is_read_again_and_fails_again() -> None:
    assert only_open(index_of(LETTER, handled(LETTER), LETTER).entries()) == []
    assert len(index_of(LETTER, handled(LETTER)).entries()) == 1


def test_a_topic_that_was_created_again_is_not_hidden_by_what_was_dropped_in_its_former_life() -> None:
    other = replace(LETTER, value=b"{also broken")
    (left,) = only_open(index_of(LETTER, handled(LETTER), other).entries())
    assert left.digest == other.digest != LETTER.digest


def test_key_and_value_do_not_run_into_each_other() -> None:
    digests = {
        replace(LETTER, key=key, value=value).digest
        for key, value in [(b"a", b"b"), (b"ab", b""), (b"ab", None), (None, b"ab"), (b"", b"ab")]
    }
    assert len(digests) == 5


def test_what_is_no_letter_is_counted_and_does_no_harm() -> None:
    index = index_of(LETTER)
    index.add(key=b"x", value=b"y", headers=[], at=(0, 5))
    index.add(key=b"x", value=None, headers=[("handled", b"eaten")], at=(0, 6))
    assert (index.unreadable, len(index.entries())) == (2, 1)


@pytest.mark.parametrize(
    ("admitted", "filter_"),
    [
        (True, Filter()),
        (True, Filter(ids=frozenset({"items/3/7"}), topic="items", stage="decode", reason=Reason.NOT_JSON, since=NOW)),
        (False, Filter(ids=frozenset({"items/3/8"}))),
        (False, Filter(topic="behaviours")),
        (False, Filter(stage="write")),
        (False, Filter(reason=Reason.BAD_IMAGE)),
        (False, Filter(since=NOW + timedelta(seconds=1))),
        (False, Filter(key=b"other")),
        (True, Filter(key=b"k")),
    ],
)
def test_each_filter_admits_what_it_names(admitted: bool, filter_: Filter) -> None:
    (entry,) = index_of(LETTER).entries()
    assert filter_.admits(entry.newest) is admitted


def test_a_record_that_failed_again_is_as_new_as_its_last_failure() -> None:
    again = replace(LETTER, first_failed_at=NOW - timedelta(days=9))
    assert Filter(since=NOW).admits(again) and not Filter(since=NOW + timedelta(seconds=1)).admits(again)


@pytest.mark.parametrize(
    ("later", "decision"),
    [
        ([], RequeueDecision("send")),
        ([LaterRecord(9, None)], RequeueDecision("superseded", 9)),
        ([LaterRecord(9, b"another letter")], RequeueDecision("superseded", 9)),
        ([LaterRecord(9, b"L")], RequeueDecision("already", 9)),
        ([LaterRecord(9, b"L"), LaterRecord(12, None)], RequeueDecision("already", 9)),
        ([LaterRecord(8, None), LaterRecord(9, b"L")], RequeueDecision("put_back", 8)),
        ([LaterRecord(8, None), LaterRecord(9, b"L"), LaterRecord(10, None)], RequeueDecision("already", 9)),
        ([LaterRecord(7, None), LaterRecord(8, None), LaterRecord(9, b"L")], RequeueDecision("put_back", 8)),
    ],
)
def test_a_record_is_sent_again_unless_a_newer_one_came(later: list[LaterRecord], decision: RequeueDecision) -> None:
    assert decide(b"L", later) == decision
