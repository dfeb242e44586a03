"""What was searched: names, words, and how rows keep it."""

from __future__ import annotations

import numpy as np
import pytest

from schemas.queries import parse_query_key, query_id, query_key
from tests.factories.feeding import through_bytes
from tests.factories.samples import DIM, behaviour, unit_vector
from trainer.samples.catalogue import Catalogue
from trainer.samples.label_join import ImpressionJoin
from trainer.samples.rows import Impression, pack_impressions, unpack_impressions
from trainer.samples.searches import (
    HIDDEN_OF,
    MOST_WORDS,
    SearchUse,
    hashed_words,
    is_hidden,
    is_query,
    query_columns,
    searched,
    words_of_searches,
)
from trainer.samples.window import Observed


def test_a_search_is_named_by_its_words_and_its_photo() -> None:
    names = [query_id("red shoe", None), query_id("red shoe", b"1"), query_id(None, b"1"), query_id("Red shoe", None)]
    assert None not in names and len(set(names)) == 4
    assert query_id("  red \n shoe", None) == names[0] and query_id("", b"1") == names[2]
    assert query_id(" ", None) is query_id(None, None) is query_id("", b"") is None
    assert query_id("\ud800", None) is not None  # a text that UTF-8 has no form for


def test_keys_of_the_topic_say_encoder_and_query() -> None:
    query = query_id("red shoe", None) or ""
    assert parse_query_key(query_key("enc-1", query)) == ("enc-1", query)
    for broken in (b"", None, b"enc-1", b"enc-1:", b"enc-1:zz", query.encode(), b":" + query.encode()):
        with pytest.raises(ValueError, match="not a key"):
            parse_query_key(broken)


def test_no_item_can_have_the_name_of_a_query() -> None:
    name = searched("red shoe", None)
    assert name is not None and is_query(name) and not name.isprintable() and not is_query("query:red shoe")


def test_words_are_compared_in_any_case_and_only_the_first_of_them() -> None:
    assert hashed_words("Red, red SHOE!") == hashed_words("red shoe") and len(hashed_words("Red, red SHOE!")) == 2
    assert hashed_words(None) == hashed_words("") == hashed_words("?!") == ()
    assert len(hashed_words(" ".join(map(str, range(100))))) == MOST_WORDS


def test_columns_say_how_much_of_the_search_stands_in_the_title_and_of_the_title_in_the_search() -> None:
    titles = words_of_searches(["red running shoe", "shoe red", "hat", ""])
    found = query_columns(np.ones(4, bool), words_of_searches(["red shoe"]), titles)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[1, 1, 2 / 3, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]], rtol=1e-6)
    each = query_columns(np.ones(4, bool), words_of_searches(["red shoe"] * 4), titles)
    np.testing.assert_array_equal(each, found)
    assert not query_columns(np.zeros(4, bool), words_of_searches(["red shoe"]), titles).any()
    of_photo = query_columns(np.ones(4, bool), words_of_searches([None]), titles)
    assert of_photo.tolist() == [[1, 0, 0, 0]] * 4


def joined(searches: SearchUse, **said: object) -> tuple[Impression, Catalogue]:
    catalogue = Catalogue(DIM)
    join = ImpressionJoin(
        catalogue, history_length=3, attribution_seconds=1, max_users=9, searches=searches, corrections=None
    )
    event = behaviour("x", user="u2", item="a", **said)
    assert not is_hidden("u2", 0)
    join.add_second([Observed(0, 0, 0, event)])
    (row,) = join.resolved(float("inf"))
    assert set(join.items_in_use()) <= {0}
    return row, catalogue


def test_rows_keep_of_a_search_what_their_reader_wants() -> None:
    said = {"query_text": "red shoe", "query_image": "AAAA"}
    row, _ = joined(SearchUse.RAW, **said)
    assert (row.query_text, row.query_image, row.query) == ("red shoe", b"\0\0\0", 0)
    row, _ = joined(SearchUse.NOTHING, **said)
    assert (row.query_text, row.query_image, row.query) == (None, None, 0)
    row, catalogue = joined(SearchUse.NUMBERED, **said)
    assert (row.query_text, row.query_image) == ("red shoe", None)  # the photo is not kept beside its vector
    assert catalogue.item_id(row.query) == searched("red shoe", b"\0\0\0")
    row, catalogue = joined(SearchUse.NUMBERED, query_text=" ")
    assert (row.query_text, row.query) == (None, 0) and catalogue.named == 1


def test_a_take_without_a_search_or_trigger_of_its_own_has_those_of_its_exposure() -> None:
    catalogue = Catalogue(DIM)
    join = ImpressionJoin(catalogue, history_length=3, attribution_seconds=9, max_users=9, searches=SearchUse.NUMBERED)
    shown = behaviour("x", user="u2", item="a", query_text="red shoe", trigger_item="b")
    other = behaviour("y", user="u2", item="c")
    takes = [behaviour(f"t{name}", "click", user="u2", item=name, second=1) for name in "ac"]
    takes.append(behaviour("t", "click", user="u2", item="a", second=1, query_text="hat", trigger_item="c"))
    first, second, own = (
        [*join.add_second([Observed(0, n, 0, event) for n, event in enumerate((shown, other))])],
        join.add_second([Observed(0, 2 + n, 1, event) for n, event in enumerate(takes[:2])]),
        join.add_second([Observed(0, 4, 1, takes[2])])[0],
    )
    assert not first
    named = [[catalogue.item_id(number) for number in take.numbers] for take in (*second, own)]
    assert named == [["a", searched("red shoe", None), "b"], ["c"], ["a", searched("hat", None), "c"]]


def test_one_search_in_twenty_is_hidden_and_all_rows_of_it_alike() -> None:
    hidden = [is_hidden(f"u{user}", second) for user in range(100) for second in range(100)]
    assert sum(hidden) == pytest.approx(len(hidden) / HIDDEN_OF, rel=0.2)
    user = next(f"u{n}" for n in range(1000) if is_hidden(f"u{n}", 0))
    catalogue = Catalogue(DIM)
    join = ImpressionJoin(catalogue, history_length=3, attribution_seconds=1, max_users=9, searches=SearchUse.NUMBERED)
    shown = [behaviour(f"x{n}", user=user, item=f"i{n}", query_text="red shoe") for n in range(3)]
    join.add_second([Observed(0, n, 0, event) for n, event in enumerate(shown)])
    rows = list(join.resolved(float("inf")))
    assert len(rows) == 3 and all((row.query, row.query_text) == (0, None) for row in rows)


def test_the_number_of_a_search_survives_a_restart_and_earlier_rows_have_none() -> None:
    rows = [Impression("e", 0, n, 0, "u", 1, (), (), False, False, query=n, query_text="w" * n or None) for n in (7, 0)]
    packed = through_bytes(pack_impressions(rows))
    assert unpack_impressions(packed) == rows
    del packed.arrays["query"]
    assert [row.query for row in unpack_impressions(packed)] == [0, 0]


def test_a_query_has_a_vector_in_the_catalogue_as_items_have() -> None:
    catalogue = Catalogue(DIM)
    name = searched("red shoe", None)
    assert name is not None
    number = catalogue.number(name)
    assert not catalogue.has_vector(number)
    catalogue.put_query(name, unit_vector(3))
    assert catalogue.has_vector(number) and catalogue.digest(number)
    np.testing.assert_array_equal(catalogue.vectors(np.array([number]))[0], unit_vector(3))
    other = Catalogue(DIM)
    other.restore(through_bytes(catalogue.snapshot()))
    assert other.digest(number) == catalogue.digest(number)
    with pytest.raises(ValueError, match="shape"):
        catalogue.put_query(name, unit_vector(3, DIM + 1))


def test_of_more_queries_than_items_may_have_numbers_those_announced_longest_ago_leave() -> None:
    names = [searched(f"word {n}", None) or "" for n in range(40)]
    catalogue = Catalogue(DIM, most_items=10)
    kept = catalogue.number(names[0])
    for n, name in enumerate(names):
        catalogue.put_query(name, unit_vector(n))
        catalogue.put_query(names[1], unit_vector(1))  # still searched
    held = [name for name in names if catalogue.holds(name)]
    assert len(held) <= 12 and {names[0], names[1], *names[-3:]} <= set(held) and names[5] not in held
    assert catalogue.has_vector(kept)
    other = Catalogue(DIM, most_items=10)
    other.restore(through_bytes(catalogue.snapshot()))
    for n in range(40, 60):
        other.put_query(searched(f"word {n}", None) or "", unit_vector(n))
    assert len(other) <= 13 and other.holds(names[0])
