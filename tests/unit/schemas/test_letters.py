"""Dead letters: what a letter keeps of its record, and how it is read back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from schemas.errors import Reason
from schemas.letters import Action, DeadLetter, ForeignHeaders, Handled, RequeueHeaders, kept_headers

NOW = datetime(2026, 5, 1, tzinfo=UTC)
EARLIER = NOW - timedelta(days=2)
LETTER = DeadLetter("items", 1, 7, b"a", b"{", "decode", Reason.NOT_JSON, "x", NOW)
SENT_AGAIN = RequeueHeaders(b"items/1/3", 4, EARLIER)


def read_again(letter: DeadLetter) -> DeadLetter:
    return DeadLetter.from_record(letter.value, letter.headers())


@pytest.mark.parametrize(
    "letter",
    [
        replace(LETTER, first_failed_at=EARLIER),
        replace(LETTER, requeued_from="items/1/3"),
        replace(LETTER, first_failed_at=EARLIER, requeued_from="items/1/3", attempts=9, stage="write"),
        replace(LETTER, record_headers=(("trace", b"7"), ("trace", None), ("key", b"own"), ("header:x", b""))),
        replace(LETTER, key=None),
        replace(LETTER, key=b""),
        replace(LETTER, value=None),
        replace(LETTER, detail="x" * 1_000),
    ],
)
def test_every_field_of_a_letter_is_read_back(letter: DeadLetter) -> None:
    assert read_again(letter) == letter


def test_a_long_text_of_an_error_is_cut_and_one_that_is_no_unicode_is_kept_readable() -> None:
    assert read_again(replace(LETTER, detail="x" * 1_001)).detail == "x" * 1_000
    assert read_again(replace(LETTER, detail="a\ud800")).detail == "a\\ud800"


def test_times_of_letters_are_in_utc_whatever_zone_they_were_written_in() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=2)))
    found = read_again(replace(LETTER, failed_at=there, first_failed_at=there))
    assert found.failed_at.isoformat() == NOW.isoformat()
    assert found.first_failed_at is not None and found.first_failed_at.isoformat() == NOW.isoformat()


def test_a_digest_is_that_of_key_and_value_with_their_border_and_nothing_else() -> None:
    parts = [(b"ab", b"c"), (b"a", b"bc"), (b"", b"abc"), (b"abc", b""), (None, b"abc"), (b"abc", None), (None, None)]
    digests = [replace(LETTER, key=key, value=value).digest for key, value in parts]
    assert len(set(digests)) == len(parts) and {len(digest) for digest in digests} == {16}
    elsewhere = replace(LETTER, topic="behaviours", partition=9, offset=1, detail="y", attempts=3, failed_at=EARLIER)
    assert elsewhere.digest == LETTER.digest and elsewhere.letter_key == b"behaviours/9/1"


def test_a_record_that_was_sent_again_counts_on_and_keeps_its_own_headers_alone() -> None:
    own: ForeignHeaders = [("trace", b"7"), ("empty", None)]
    plain = LETTER.after(iter(own))
    assert plain == replace(LETTER, record_headers=tuple(own))
    again = replace(LETTER, attempts=2).after([*own, *SENT_AGAIN.headers()])
    assert again == replace(plain, attempts=6, first_failed_at=EARLIER, requeued_from=SENT_AGAIN.letter_key.decode())
    assert RequeueHeaders.of(again) == RequeueHeaders(b"items/1/7", 6, EARLIER)
    assert RequeueHeaders.of(LETTER) == RequeueHeaders(b"items/1/7", 1, NOW)


@pytest.mark.parametrize("key", [b"a.b_c-D/0/1", b"x" * 249 + b"/%d/1" % 10**17])
def test_headers_of_a_record_that_was_sent_again_are_read_back(key: bytes) -> None:
    sent = RequeueHeaders(key, 10**17, EARLIER)
    assert RequeueHeaders.from_headers(sent.headers()) == sent


@pytest.mark.parametrize("key", [b"x" * 250 + b"/0/1", b"/0/1", b"items/0", b"items/0/1/2", b"items/0/1\n", b"a b/0/1"])
def test_what_is_no_letters_key_is_not_taken_for_one(key: bytes) -> None:
    assert RequeueHeaders.from_headers(RequeueHeaders(key, 1, NOW).headers()) is None


@pytest.mark.parametrize(("name", "value"), [("n", b"x"), ("ñ", b"x"), ("\ud800", b"x"), ("n", None)])
def test_headers_are_kept_up_to_eight_kib_together_and_none_beyond(name: str, value: bytes | None) -> None:
    size = len(name.encode(errors="backslashreplace")) + len(value or b"") + 32
    room = 8_192 - size - len("big") - 32
    fitting = [(name, value), ("big", b"x" * room)]
    assert kept_headers(fitting) == tuple(fitting)
    assert kept_headers([(name, value), ("big", b"x" * (room + 1))]) == ()
    ours = [("attempts", b"9" * 100), ("requeued-from", b"x"), ("first-failed-at", b"x")]  # take no room
    assert kept_headers([*ours, *fitting]) == tuple(fitting)


@pytest.mark.parametrize("action", ["requeued", "dropped"])
def test_that_a_letter_was_handled_is_read_back_and_is_no_letter(action: Action) -> None:
    mark = Handled(LETTER.letter_key, LETTER.digest, action, NOW)
    assert Handled.from_record(mark.letter_key, mark.headers()) == mark
    assert Handled.from_record(None, mark.headers()) is None
    assert Handled.from_record(LETTER.letter_key, LETTER.headers()) is None
    headers = [("handled", b"burnt"), *mark.headers()[1:]]
    with pytest.raises(ValueError, match="requeued or dropped, not 'burnt'"):
        Handled.from_record(mark.letter_key, headers)
    with pytest.raises(KeyError):
        Handled.from_record(mark.letter_key, mark.headers()[:2])


@pytest.mark.parametrize("name", ["partition", "offset", "attempts"])
@pytest.mark.parametrize(("value", "count"), [(b"0", 0), (b"9" * 18, 10**18 - 1), (b"9" * 19, None), (b"+1", None)])
def test_numbers_of_letters_have_up_to_eighteen_digits(name: str, value: bytes, count: int | None) -> None:
    headers = dict(LETTER.headers()) | {name: value}
    if count is None:
        with pytest.raises(ValueError, match="at most 18 digits"):
            DeadLetter.from_record(b"{", headers.items())
    else:
        assert getattr(DeadLetter.from_record(b"{", headers.items()), name) == count
