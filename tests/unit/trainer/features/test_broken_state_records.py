"""Records of states that no trainer writes: each is refused, and changes no more than its own item."""

from __future__ import annotations

import numpy as np
import pytest

from schemas.item_states import MOST_WRITES, StateHead, state_key, state_value
from tests.factories.state_pipe import CONFIG, TAKES, Pipe, asked, of_server
from trainer.features.config import HALF_LIVES
from trainer.features.state_records import StateCopies, StateWriter
from trainer.features.states import SharedCounts, TakeRows
from trainer.samples.id_hashes import id_hashes

VERSION = b"0123456789abcdef:"


@pytest.mark.parametrize(
    "key",
    [
        *(b"", None, b"x", b"0123456789abcdef", VERSION + b"1", b"0123:head", VERSION + b"HEAD", VERSION + b"head\n"),
        *(
            VERSION + item
            for item in (b"0" * 16, b"f" * 16, b"+123456789abcdef", b"00000000000000_1", b"123456789abcdeF")
        ),
        *(b"0123456789ABCDEF:head", b"\xff" * 16 + b":head", b"k" * 100_000),
    ],
    ids=lambda key: repr(key)[:30],
)
def test_a_key_that_is_none_is_refused(key: bytes | None) -> None:
    with pytest.raises(ValueError, match="key of item-states"):
        StateCopies(CONFIG).apply(key, None)
    StateWriter(CONFIG, log="log").heard(key, None)


def test_a_record_that_cannot_be_read_leaves_its_item_as_never_taken() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    key = state_key(CONFIG.version, id_hashes("i3")[0])
    whole = TakeRows.empty(CONFIG, 1).to_bytes(0)
    short, foreign = state_value(CONFIG.version, b"too short"), state_value("0" * 16, whole)
    for broken in (b"{", foreign, short, state_value(CONFIG.version, whole, pipe.copies.head)):
        with pytest.raises(ValueError, match=r"."):
            pipe.copies.apply(key, broken)
    pipe.copies.apply(*pipe.topic[-1])
    numbers, _ = asked()
    assert pipe.copies.states(pipe.world.hashes(numbers), pipe.world.facts(numbers)).takes.takes_U[3] == 0


@pytest.mark.parametrize(("count", "place"), [(float("nan"), 2), (float("inf"), 0), (-1.0, len(HALF_LIVES) - 1)])
def test_counts_that_are_none_are_refused_and_features_stay_finite(count: float, place: int) -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    rows = TakeRows.empty(CONFIG, 1)
    rows.takes_U[0], rows.decayed_UH[0, place] = 5, count
    with pytest.raises(ValueError, match="no numbers"):
        pipe.copies.apply(state_key(CONFIG.version, id_hashes("i3")[0]), state_value(CONFIG.version, rows.to_bytes(0)))
    pipe.copies.apply(*pipe.topic[-1])
    assert np.isfinite(of_server(pipe.copies, pipe.world)).all()


def test_the_largest_counts_of_an_item_leave_features_finite() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    for second in (np.iinfo(np.int64).max, np.iinfo(np.int64).min + 1):
        rows = TakeRows.empty(CONFIG, 1)
        for column, value in (
            *((rows.takes_U, 0xFFFF_FFFF), (rows.decayed_UH, np.finfo(np.float32).max)),
            *((rows.last_U, second), (rows.previous_U, second), (rows.partner_UP, 0xFFFF_FFFF)),
            (rows.together_UP, 0xFFFF),
        ):
            column[...] = value
        pipe.copies.apply(state_key(CONFIG.version, id_hashes("i3")[0]), state_value(CONFIG.version, rows.to_bytes(0)))
        pipe.copies.apply(*pipe.topic[-1])
        assert np.isfinite(of_server(pipe.copies, pipe.world)).all()


SHARED = SharedCounts.empty().to_bytes()
HEAD = StateHead(number=7, before=0, left=0, log="log")
BROKEN_HEADS = {
    "tombstone": None,
    "no json": b"{",
    "no head": state_value(CONFIG.version, SHARED),
    "length": state_value(CONFIG.version, SHARED[:-1], HEAD),
    "takes": state_value(CONFIG.version, b"\xff" * 8 + SHARED[8:], HEAD),
    **{
        name: state_value(CONFIG.version, SHARED, HEAD).replace(was, now)
        for name, was, now in (
            ("number", b'"number":7', b'"number":1' + b"0" * 400),
            ("negative", b'"number":7', b'"number":-7'),
            ("before", b'"before":0', b'"before":9223372036854775808'),
            ("infinite", b'"before":0', b'"before":1e999'),
            ("left", b'"left":0', b'"left":-1'),
        )
    },
}


@pytest.mark.parametrize("value", BROKEN_HEADS.values(), ids=BROKEN_HEADS.keys())
def test_a_head_that_cannot_be_read_is_refused_and_changes_nothing_and_the_trainer_writes_another(
    value: bytes | None,
) -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    head, served = pipe.copies.head, of_server(pipe.copies, pipe.world).tobytes()
    with pytest.raises(ValueError, match=r"."):
        pipe.copies.apply(state_key(CONFIG.version, None), value)
    assert pipe.copies.head == head and pipe.copies.complete
    assert of_server(pipe.copies, pipe.world).tobytes() == served
    pipe.topic.append((state_key(CONFIG.version, None), value))
    pipe.restart()
    assert pipe.write() == 1 and pipe.copies.complete
    assert of_server(pipe.copies, pipe.world).tobytes() == served


def test_the_write_after_the_largest_number_begins_anew() -> None:
    pipe = Pipe()
    pipe.count(TAKES)
    last = HEAD.model_copy(update={"number": MOST_WRITES, "before": 1})
    pipe.writer.heard(state_key(CONFIG.version, None), state_value(CONFIG.version, SHARED, last))
    assert pipe.write() == 1 and pipe.copies.head is not None and pipe.copies.head.number == 1
