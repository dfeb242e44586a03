"""Which pairs the log makes, which hard negatives stand beside them, and the ring they are remembered in."""

from base64 import b64encode

import numpy as np
import pytest

from schemas.behaviours import BehaviourKind
from tests.factories.csft import event, make_numbers
from tests.factories.samples import DAY0
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import AnchorKind, HardNegatives, NoPair, PairMiner, batches, join_all
from trainer.negatives.memory_bank import SpaceTimeMemory, TakeBank
from trainer.negatives.sampler import SpaceTimeSampler, TakeCounts
from trainer.samples.corrections import CorrectableRows
from trainer.samples.rows import Impression, Take

PURCHASE, CLICK, CART = BehaviourKind.PURCHASE, BehaviourKind.CLICK, BehaviourKind.CART


def mine(seconds, **kwargs):
    numbers = make_numbers(20)
    impressions = join_all(seconds, numbers, history_length=10, attribution_seconds=5.0)
    return list(PairMiner(numbers, **kwargs).pairs(impressions))


def shown_and_taken(name, second, user, item, kind=PURCHASE, query=None):
    return [
        [event(name, second, user, item, query_text=query)],
        [event(f"t{name}", second + 1, user, item, kind, exposure_id=name)],
    ]


def one_after_the_other(user, *items):
    """Takes of a user, ten seconds apart."""
    shown = [shown_and_taken(f"{user}{n}", 10 * n, user, item) for n, item in enumerate(items)]
    return [events for both in shown for events in both]


def test_the_anchor_is_what_was_taken_before_and_never_what_came_later():
    #   i1 taken   i2 taken   i3 taken
    # ──────●──────────●──────────●────▶
    pairs = mine(one_after_the_other("u", "i1", "i2", "i3"))
    assert [(pair.row.item, pair.anchor) for pair in pairs] == [(2, (1,)), (3, (1, 2))]
    assert all(pair.anchor_kind is AnchorKind.TRIGGER_ITEM for pair in pairs)


def test_a_search_is_the_anchor_where_there_was_one():
    pairs = mine([*shown_and_taken("a", 0, "u", "i1", query="red shoes")], queries={"red shoes": 15})
    assert [(pair.anchor_kind, pair.anchor, pair.view) for pair in pairs] == [(AnchorKind.QUERY_TEXT, (15,), 1)]


def test_a_take_that_makes_no_pair_is_counted_with_its_reason():
    numbers = make_numbers(20)
    seconds = [*one_after_the_other("u", "i1", "i2", "i1"), *shown_and_taken("a", 40, "v", "i99", query="q")]
    miner = PairMiner(numbers)
    impressions = join_all(seconds, numbers, history_length=10, attribution_seconds=5.0)
    assert [pair.row.item for pair in miner.pairs(impressions)] == [2]
    assert miner.no_pair == {NoPair.NO_ANCHOR: 1, NoPair.TAKEN_BEFORE: 1, NoPair.ITEM_NOT_LEARNED: 1}


def kinds(seconds, **kwargs):
    """Item and kind of each pair, all of users who searched."""
    return [(pair.row.item, pair.kind) for pair in mine(seconds, queries={"q": 15}, **kwargs)]


def test_a_click_that_became_a_purchase_at_a_later_look_is_a_purchase():
    clicked, bought = shown_and_taken("a", 0, "u", "i1", CLICK, query="q"), shown_and_taken("b", 600, "u", "i1")
    assert kinds([*clicked, *bought], take_seconds={CLICK: 0.0, PURCHASE: 600.0}) == [(1, PURCHASE)]
    assert kinds([*clicked, *bought], take_seconds={CLICK: 900.0, PURCHASE: 599.0}) == [(1, CLICK)]


def test_a_purchase_stays_one_whatever_its_user_or_others_do_later():
    bought, clicked = shown_and_taken("a", 0, "u", "i1", query="q"), shown_and_taken("b", 20, "u", "i1", CLICK)
    other = shown_and_taken("c", 40, "v", "i1", CART, query="q")
    window = dict.fromkeys((CLICK, CART, PURCHASE), 600.0)
    assert kinds([*bought, *clicked, *other], take_seconds=window) == [
        (1, PURCHASE),
        (1, CART),
    ]


def test_the_most_reliable_kind_of_take_decides_the_weight():
    seconds = [*shown_and_taken("a", 0, "u", "i1"), [event("b", 10, "u", "i2")],
               [event("c1", 11, "u", "i2", PURCHASE, exposure_id="b")],
               [event("c2", 12, "u", "i2", CLICK, exposure_id="b")]]  # fmt: skip
    (pair,) = mine(seconds)
    assert pair.kind is PURCHASE
    config = CsftConfig()
    assert config.weight_of(PURCHASE) > config.weight_of(CART) > config.weight_of(CLICK) > 0


def test_held_out_items_are_neither_positives_nor_anchors():
    left_out = np.zeros(21, bool)
    left_out[[1, 3]] = True
    seconds = one_after_the_other("u", "i1", "i2", "i3", "i4")
    assert [(pair.row.item, pair.anchor) for pair in mine(seconds, left_out=left_out)] == [(4, (2,))]


def test_the_hard_negative_is_what_the_user_passed_over_else_the_same_category_never_what_he_took():
    passed_over = [event("x", 5, "u", "i9"), event("y", 5, "u", "i1")]
    seconds = [passed_over, *one_after_the_other("u", "i1", "i2"), *one_after_the_other("v", "i1", "i2")]
    ours, theirs = mine(sorted(seconds, key=lambda events: events[0].second))
    category = np.array([-1, 0, 0, 0, *[1] * 17])
    hard = HardNegatives(category, usable=np.arange(21) > 0)
    rng = np.random.default_rng(0)
    assert ours.passed_over == (9,)
    assert {hard.choose(ours, rng) for _ in range(20)} == {9}
    assert {hard.choose(theirs, rng) for _ in range(40)} <= {3, 0}
    assert 3 in {hard.choose(theirs, rng) for _ in range(40)}


def test_what_was_taken_after_the_same_search_is_no_negative():
    seconds = [*shown_and_taken("a", 0, "u", "i1", query="q"), *shown_and_taken("b", 10, "v", "i2", query="q"),
               *shown_and_taken("c", 20, "w", "i3", query="other")]  # fmt: skip
    pairs = mine(seconds, queries={"q": 15, "other": 16})
    memory = SpaceTimeMemory(window_seconds=1e9, window_takes=10, bank_takes=10, bank_seconds=1e9)
    plan = SpaceTimeSampler(space=0, time=0, needs_history=False).plan(
        [pair.row for pair in pairs], memory, TakeCounts(1e9), make_numbers(20), np.random.default_rng(0)
    )
    assert plan.candidates.tolist() == [1, 2, 3]
    assert plan.allowed.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


@pytest.mark.parametrize("capacity", [1, 3, 7])
def test_the_ring_keeps_the_newest_of_any_stretch_across_its_seam(capacity):
    bank = TakeBank(capacity, max_age_seconds=1e9, max_age_steps=100, vector_width=2)
    for n in range(1, 12):
        bank.add(Take(n, "u", n), step=n, vector=np.full(2, n, np.float32))
        expected = list(range(max(1, n - capacity + 1), n + 1))
        assert bank.items(n, step=n).tolist() == expected
        vectors, ages = bank.newest_rows(np.array(expected), step=n)
        assert vectors[:, 0].tolist() == expected
        assert ages.tolist() == [n - step for step in expected]


def test_the_ring_forgets_by_count_by_event_time_and_by_steps():
    bank = TakeBank(10, max_age_seconds=100.0, max_age_steps=5)
    for n, (second, step) in enumerate([(0, 0), (50, 3), (120, 4), (130, 8)], start=1):
        bank.add(Take(second, "u", n), step=step)
    assert bank.items(130, step=8).tolist() == [2, 3, 4]
    assert bank.items(130, step=9).tolist() == [3, 4]
    assert bank.items(225, step=9).tolist() == [4]


def test_a_restored_ring_goes_on_as_the_one_it_was_taken_from():
    def memory():
        return SpaceTimeMemory(window_seconds=10, window_takes=2, bank_takes=5, bank_seconds=1e9, bank_steps=9)

    one, other = memory(), memory()
    for n in range(1, 10):
        one.step = n
        one.add(Take(n, "u", n))
    other.restore(one.snapshot())
    for n in range(10, 14):
        for either in (one, other):
            either.step = n
            either.add(Take(n, "u", n))
        assert other.bank_items(n).tolist() == one.bank_items(n).tolist()
        assert other.window_items().tolist() == one.window_items().tolist()


def test_a_ring_of_another_size_is_not_restored():
    state = TakeBank(5, max_age_seconds=1.0).snapshot()
    with pytest.raises(ValueError, match="shape"):
        TakeBank(6, max_age_seconds=1.0).restore(state)


def test_batches_hold_every_pair_once_and_stay_inside_their_block_of_time():
    numbers = make_numbers(20)
    seconds = one_after_the_other("u", *(f"i{n % 9 + 1}" for n in range(30)))
    impressions = join_all(seconds, numbers, history_length=3, attribution_seconds=5.0)
    pairs = list(PairMiner(numbers).pairs(impressions))
    got = list(batches(pairs, size=4, rng=np.random.default_rng(0), shuffle_seconds=100))
    flat = [pair.row.second for batch in got for pair in batch]
    assert sorted(flat) == [pair.row.second for pair in pairs]
    assert [second // 100 for second in flat] == sorted(second // 100 for second in flat)
    assert min(flat) >= DAY0


def test_the_newest_things_passed_over_stand_beside_a_pair_without_what_its_user_took():
    seconds = [[event(f"p{n}", n, "u", f"i{n}")] for n in range(5, 11)]
    seconds += shown_and_taken("a", 20, "u", "i9")
    seconds += shown_and_taken("b", 40, "u", "i12", query="q")
    (pair,) = mine(seconds, queries={"q": 15}, passed_over_length=3)
    assert pair.row.item == 12 and pair.passed_over == (8, 10)


def test_only_so_many_users_have_things_passed_over_the_one_inactive_for_longest_has_none():
    seconds = [[event(f"p{user}{n}", n, user, "i9")] for n, user in enumerate("uvuw")]
    for n, user in enumerate("uvw"):
        seconds += shown_and_taken(f"t{user}", 20 + 10 * n, user, "i12", query="q")
    pairs = mine(seconds, queries={"q": 15}, max_users=2)
    assert [(pair.row.user_id, pair.passed_over) for pair in pairs] == [("u", (9, 9)), ("v", ()), ("w", (9,))]


def test_a_photo_goes_before_words_and_both_before_what_was_taken():
    both = {"query_text": "q", "query_image": b64encode(b"photo").decode()}
    seconds = one_after_the_other("u", "i1")
    seconds += [[event("x", 50, "u", "i3", **both)], [event("t", 51, "u", "i3", PURCHASE, exposure_id="x")]]
    for queries, kind, anchor in (
        ({"q": 15, b"photo": 16}, AnchorKind.QUERY_IMAGE, (16,)),
        ({"q": 15}, AnchorKind.QUERY_TEXT, (15,)),
        ({}, AnchorKind.TRIGGER_ITEM, (1,)),
    ):
        (pair,) = [pair for pair in mine(seconds, queries=queries) if pair.row.item == 3]
        assert (pair.anchor_kind, pair.anchor) == (kind, anchor)


def test_the_positive_is_no_anchor_of_itself_where_it_was_looked_at():
    seconds = one_after_the_other("u", "i1")
    seconds += [[event("x", 50, "u", "i3", trigger_item="i3")], [event("t", 51, "u", "i3", PURCHASE, exposure_id="x")]]
    assert [(pair.row.item, pair.anchor) for pair in mine(seconds)] == [(3, (1,))]


def test_a_first_take_is_watched_for_the_longest_window_of_all_kinds():
    seconds = shown_and_taken("a", 0, "u", "i1", CLICK, query="q")
    seconds += shown_and_taken("b", 300, "v", "i2", CLICK, query="q")
    seconds += shown_and_taken("c", 500, "u", "i1")
    window = {CLICK: 10.0, PURCHASE: 600.0}
    assert kinds(seconds, take_seconds=window) == [(1, PURCHASE), (2, CLICK)]


def test_a_log_that_is_closed_has_its_late_takes_where_they_were_shown():
    numbers = make_numbers(20)
    windows = dict.fromkeys((CLICK, CART, PURCHASE), 100.0)
    seconds = [[event("x", 0, "u", "i1")], [event("y", 1, "u", "i2")]]
    seconds += [[event("t1", 20, "u", "i1", CART, exposure_id="x")], [event("t2", 30, "u", "i1", PURCHASE)]]
    seconds += [[event("z", 40, "u", "i3")]]
    corrections = CorrectableRows(windows, most_bytes=1e9, most_rows=1e9, upgrades=True)
    rows = list(join_all(seconds, numbers, history_length=5, attribution_seconds=5.0, corrections=corrections))
    assert [(row.event_id, row.label, row.taken_as) for row in rows] == [
        ("x", 1, PURCHASE),
        ("y", 0, None),
        ("z", 0, None),
    ]


def test_neither_the_positive_nor_an_earlier_take_is_the_hard_negative_of_its_category():
    (pair,) = [pair for pair in mine(one_after_the_other("u", "i1", "i2", "i3")) if pair.row.item == 3]
    hard = HardNegatives(np.array([-1, 0, 0, 0, 0, *[1] * 16]), usable=np.arange(21) > 0, exposed_first=False)
    found = {hard.choose(pair, np.random.default_rng(seed)) for seed in range(60)}
    assert found == {0, 4}


def test_what_was_passed_over_at_first_and_taken_later_is_no_negative_of_its_own_take_nor_of_later_ones():
    seconds = [[event("x", 0, "u", "i1")], [event("y", 1, "u", "i2")], [event("z", 2, "u", "i3")]]
    seconds += shown_and_taken("a", 20, "u", "i1", query="q")
    seconds += shown_and_taken("b", 40, "u", "i2", query="q")
    pairs = mine(seconds, queries={"q": 15})
    assert [(pair.row.item, pair.passed_over) for pair in pairs] == [(1, (2, 3)), (2, (3,))]


def test_every_take_without_a_pair_is_counted():
    numbers = make_numbers(20)
    miner = PairMiner(numbers)
    seconds = one_after_the_other("u", "i1", "i2", "i1", "i2", "i1")
    list(miner.pairs(join_all(seconds, numbers, history_length=10, attribution_seconds=5.0)))
    assert miner.no_pair == {NoPair.NO_ANCHOR: 1, NoPair.TAKEN_BEFORE: 3}


def test_a_first_take_is_watched_up_to_the_last_second_of_its_window():
    clicked = shown_and_taken("a", 0, "u", "i1", CLICK, query="q")
    other = [event("b", 600, "v", "i2", query_text="q"), event("c", 600, "u", "i1")]
    taken = [
        event("tb", 601, "v", "i2", exposure_id="b", kind="click"),
        event("tc", 601, "u", "i1", "purchase", exposure_id="c"),
    ]
    assert kinds([*clicked, other, taken], take_seconds={PURCHASE: 600.0}) == [(1, PURCHASE), (2, CLICK)]


def test_a_take_whose_kind_is_not_known_counts_as_a_click_until_it_is():
    rows = [
        Impression("e", 0, n, n, "u", 1, (2,), (0,), retaken=n > 0, defines_publish=False, label=1, taken_as=kind)
        for n, kind in enumerate((None, CART))
    ]
    miner = PairMiner(make_numbers(20), take_seconds={CART: 5.0})
    found = miner.pairs(rows)
    pair = next(found)
    assert pair.kind is CLICK and not list(found) and pair.kind is CART


def test_what_cannot_be_learned_is_neither_passed_over_nor_a_hard_negative():
    seen = [event("x", 0, "u", "i9"), event("y", 0, "u", "gone")]
    (pair,) = mine([seen, *shown_and_taken("a", 1, "u", "i1"), *shown_and_taken("b", 5, "u", "i2")])
    assert pair.passed_over == (9,)
    rng, category = np.random.default_rng(0), np.array([-1, 0, 0, 0, *[1] * 17])
    (other,) = mine(one_after_the_other("v", "i1", "i2"))
    only = HardNegatives(category, usable=np.isin(np.arange(21), [1, 2]))
    assert {only.choose(other, rng) for _ in range(20)} == {0}, "both were taken, and the third is not usable"


def test_a_category_of_two_has_its_other_item_found_in_most_draws():
    (pair,) = mine(one_after_the_other("v", "i5", "i1"))
    hard = HardNegatives(np.array([-1, 0, 0, *[1] * 18]), usable=np.arange(21) > 0)
    rng = np.random.default_rng(0)
    assert 0.88 < np.mean([hard.choose(pair, rng) == 2 for _ in range(400)]) < 0.98  # all but one of 16


def test_a_single_pair_is_a_batch():
    pairs = mine(one_after_the_other("v", "i5", "i1"))
    assert list(batches(pairs, size=4, rng=np.random.default_rng(0), shuffle_seconds=1.0)) == [pairs]
