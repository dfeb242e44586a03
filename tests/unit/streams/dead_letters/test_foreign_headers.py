"""Headers of any producer are data: what is not ours is passed over, and raises nothing else than it says."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from schemas.errors import BadMessage, Reason
from schemas.letters import DeadLetter, Handled, RequeueHeaders
from streams.broker.records import SourceRecord
from streams.dead_letters.inbox import DeadLetterIndex

NOW = datetime(2026, 5, 1, tzinfo=UTC)
OURS: dict[str, bytes | None] = {
    "requeued-from": b"items/0/1",
    "attempts": b"2",
    "first-failed-at": b"2026-01-01T00:00:00+00:00",
}
LETTER: dict[str, bytes | None] = {
    "topic": b"items",
    "partition": b"0",
    "offset": b"1",
    "stage": b"decode",
    "reason": b"not_json",
    "detail": b"",
    "failed-at": b"2026-01-01T00:00:00+00:00",
    "attempts": b"2",
}
FOREIGN: list[tuple[str, bytes | None]] = [
    *((name, None) for name in OURS),
    *((name, b"\xff") for name in OURS),
    *((name, b"") for name in OURS),
    ("requeued-from", b"items/-1/1"),
    ("requeued-from", b"i" * 100_000),
    ("attempts", b"-1"),
    ("attempts", b"9" * 4_000),
    ("attempts", b"1_0"),
    ("first-failed-at", b"2026-01-01T00:00:00"),
    ("first-failed-at", b"0001-01-01T00:00:00+23:59"),
    ("first-failed-at", b"9999-12-31T23:59:59-23:59"),
]


@pytest.mark.parametrize(("name", "value"), FOREIGN)
def test_a_record_with_foreign_headers_of_our_names_counts_as_not_sent_again(name: str, value: bytes | None) -> None:
    headers = tuple((OURS | {name: value}).items())
    assert RequeueHeaders.from_headers(headers) is None
    record = SourceRecord("items", 0, 7, 0, b"k", b"{", headers)
    letter = record.letter("decode", BadMessage(Reason.NOT_JSON, "detail"), failed_at=NOW)
    assert (letter.attempts, letter.first_failed_at, letter.requeued_from) == (1, None, None)
    assert DeadLetter.from_record(b"{", letter.headers()) == letter


def test_of_headers_of_one_name_the_last_counts() -> None:
    again = RequeueHeaders.from_headers([("attempts", None), ("attempts", b"x"), *OURS.items()])
    assert again == RequeueHeaders(b"items/0/1", 2, datetime(2026, 1, 1, tzinfo=UTC))
    assert RequeueHeaders.from_headers([*OURS.items(), ("attempts", None)]) is None


@pytest.mark.parametrize("name", [*LETTER, "first-failed-at", "handled", "digest", "handled-at"])
@pytest.mark.parametrize("value", [None, b"\xff", b"2026-01-01T00:00:00", b"-1", b"9" * 30])
def test_a_foreign_record_among_the_dead_letters_leaves_the_others_listed(name: str, value: bytes | None) -> None:
    index = DeadLetterIndex()
    mark: dict[str, bytes | None] = {"digest": b"0", "handled-at": b"2026-01-01T00:00:00+00:00"}
    for headers in (LETTER, LETTER | {name: value}, mark | {name: value}, {name: value}):
        index.add(key=b"items/0/1", value=b"{", headers=headers.items(), at=(0, 0))
    assert "items/0/1" in {entry.id for entry in index.entries()}


def test_a_mark_without_its_word_is_no_mark() -> None:
    assert Handled.from_record(b"items/0/1", [("handled", None)]) is None
