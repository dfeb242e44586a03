"""What each change of the pointer keeps, sets and refuses: rules without a store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.errors import Fenced, PipelineError, StoreUnavailable
from schemas.manifests import Fence
from streams.stores.artifacts import promotion
from streams.stores.artifacts.pointer import last_term, may_replace, refuse_smaller_fence, update_pointer
from streams.stores.artifacts.promotion import CurrentPointer, PointerAction, PromotionResult
from tests.factories.releases import make_manifest

AT = datetime(2026, 3, 1, tzinfo=UTC)
WHO: dict[str, Any] = {"by": "ann@host", "at": AT}
OLD, NOW, NEXT = (Fence(producer_id=1, epoch=0, term=term) for term in (4, 5, 6))
FIRST, SECOND, THIRD = (make_manifest(number) for number in (1, 2, 3))


def pointer(**changes: Any) -> CurrentPointer:
    """At the first release, written by the present trainer, with the third one on its way out."""
    made = CurrentPointer(
        release_id=FIRST.release_id,
        weights_sha256=FIRST.weights_sha256,
        fence=NOW,
        sequence=7,
        by="bob@host",
        why="before",
        doomed=[THIRD.release_id],
    )
    return made.model_copy(update=changes)


def released(before: CurrentPointer | None, **over: Any) -> CurrentPointer | PromotionResult:
    return promotion.released(before, **({"manifest": SECOND, "fence": NOW, "against": None} | WHO | over))


def chosen(before: CurrentPointer | None, **over: Any) -> CurrentPointer:
    given = {"manifest": SECOND, "seen": before, "rollback": False, "why": None} | WHO | over
    return promotion.chosen(before, **given)


CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "released": (lambda at: released(at), {"release": SECOND, "action": PointerAction.RELEASED}),
    "released by the next": (
        lambda at: released(at, fence=NEXT),
        {"release": SECOND, "action": PointerAction.RELEASED, "fence": NEXT},
    ),
    "taken over": (
        lambda at: promotion.taken_over(at, NEXT, **WHO),
        {"action": PointerAction.TAKEN_OVER, "fence": NEXT},
    ),
    "chosen": (
        lambda at: chosen(at, why="better"),
        {"release": SECOND, "action": PointerAction.PROMOTED, "why": "better"},
    ),
    "rolled back": (
        lambda at: chosen(at, rollback=True, why="worse"),
        {"release": SECOND, "action": PointerAction.ROLLED_BACK, "why": "worse", "pinned": True},
    ),
    "pinned": (
        lambda at: promotion.pinned(at, True, why="sale", **WHO),
        {"action": PointerAction.PINNED, "why": "sale", "pinned": True},
    ),
    "pruned": (
        lambda at: promotion.pruned(at, [FIRST, SECOND], [SECOND.release_id], **WHO),
        {"action": PointerAction.PRUNED, "doomed": [SECOND.release_id]},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_sets_its_own_fields_and_keeps_all_others(change: str) -> None:
    make, expected = CHANGES[change]
    release = expected.pop("release", FIRST) if "release" in expected else FIRST
    assert make(pointer()) == pointer(
        **{
            "release_id": release.release_id,
            "weights_sha256": release.weights_sha256,
            "sequence": 8,
            "by": "ann@host",
            "at": AT,
            "why": None,
        }
        | expected
    )


@pytest.mark.parametrize("rollback", [True, False])
def test_a_choice_by_hand_keeps_a_pin_and_the_fence(rollback: bool) -> None:
    after = chosen(pointer(pinned=True), rollback=rollback)
    assert (after.pinned, after.fence, after.release_id) == (True, NOW, SECOND.release_id)
    assert chosen(pointer()).pinned is False


def test_a_pin_is_taken_away_once_and_leaves_the_rest() -> None:
    assert promotion.pinned(pointer(pinned=True), False, why="over", **WHO) == pointer(
        sequence=8, by="ann@host", at=AT, why="over", action=PointerAction.UNPINNED
    )
    assert promotion.pinned(pointer(), False, why=None, **WHO) is None
    assert promotion.pinned(pointer(pinned=True), True, why=None, **WHO) is None
    with pytest.raises(PipelineError, match="nothing has been released"):
        promotion.pinned(None, False, why=None, **WHO)


def test_the_first_pointer_has_the_number_zero_and_nothing_to_take_over() -> None:
    first = released(None)
    assert isinstance(first, CurrentPointer)
    assert (first.sequence, first.fence, first.pinned, first.release_id) == (0, NOW, False, SECOND.release_id)
    assert promotion.taken_over(None, NOW, **WHO) is None
    assert promotion.pruned(None, [FIRST], [FIRST.release_id], **WHO) is None
    assert chosen(None).sequence == 0


@pytest.mark.parametrize("fence", [OLD, None])
def test_what_an_earlier_trainer_wants_is_refused_even_where_it_would_change_nothing(fence: Fence | None) -> None:
    for before in (pointer(), pointer(pinned=True), pointer(release_id=SECOND.release_id)):
        with pytest.raises(Fenced, match=before.release_id):
            released(before, fence=fence)
        with pytest.raises(Fenced, match=before.release_id):
            promotion.taken_over(before, fence, **WHO)


@pytest.mark.parametrize(
    ("against", "pinned", "result"),
    [
        (None, False, "moved"),
        (FIRST.release_id, False, "moved"),
        (THIRD.release_id, False, PromotionResult.OVERTAKEN),
        (FIRST.release_id, True, PromotionResult.PINNED),
        (THIRD.release_id, True, PromotionResult.PINNED),
    ],
)
def test_a_candidate_moves_the_pointer_only_from_what_it_was_compared_with_and_never_a_pinned_one(
    against: str | None, pinned: bool, result: Any
) -> None:
    after = released(pointer(pinned=pinned), against=against)
    assert after.release_id == SECOND.release_id if isinstance(after, CurrentPointer) else after is result
    # a promotion that is repeated finds itself current
    again = released(pointer(pinned=pinned), manifest=FIRST, against=against)
    assert isinstance(again, CurrentPointer) and again.pinned == pinned


def test_what_is_being_removed_becomes_current_in_no_way() -> None:
    for rollback in (True, False):
        with pytest.raises(PipelineError, match="being removed"):
            chosen(pointer(), manifest=THIRD, rollback=rollback)
    with pytest.raises(PipelineError, match="being removed"):
        released(pointer(), manifest=THIRD)


def test_a_choice_needs_the_pointer_as_it_was_seen_and_another_release() -> None:
    for before, seen in ((pointer(), pointer(release_id=SECOND.release_id)), (pointer(), None), (None, pointer())):
        with pytest.raises(PipelineError, match="look again"):
            chosen(before, seen=seen, manifest=make_manifest(4))
    chosen(pointer(), seen=pointer(fence=NEXT, sequence=9))  # the same release, whoever wrote it
    with pytest.raises(PipelineError, match="already"):
        chosen(pointer(), manifest=FIRST)


@pytest.mark.parametrize(
    ("too_old", "doomed_before", "there", "doomed"),
    [
        ([2, 3], [], [1, 2, 3, 4], [2, 3]),
        ([3], [2], [1, 2, 3, 4], [2, 3]),  # a removal that was interrupted goes on
        ([2], [3], [1, 2, 4], [2]),  # 3 is gone
        ([1, 2], [], [1, 2], [2]),  # never the current one
        ([4], [], [1, 2, 4], None),  # nor its parent
        ([], [], [1, 2], None),
    ],
)
def test_the_current_release_and_its_parent_are_kept_and_what_was_doomed_stays_so(
    too_old: list[int], doomed_before: list[int], there: list[int], doomed: list[int] | None
) -> None:
    parent = make_manifest(4).release_id
    manifests = [make_manifest(n, parent=parent if n == 1 else FIRST.release_id) for n in there]

    def named(numbers: list[int]) -> list[str]:
        return [make_manifest(n).release_id for n in numbers]

    after = promotion.pruned(pointer(doomed=named(doomed_before)), manifests, named(too_old), **WHO)
    assert (None if after is None else after.doomed) == (None if doomed is None else named(doomed))
    assert after is None or (after.release_id == FIRST.release_id and after.fence == NOW)


@pytest.mark.parametrize(
    ("written_under", "fence", "may"),
    [
        (None, None, True),
        (None, OLD, True),
        (NOW, NOW, True),
        (NOW, NEXT, True),
        (NOW, OLD, False),
        (NOW, None, False),
        (Fence(producer_id=9, epoch=9, term=4), NOW, True),  # the term decides
        (Fence(producer_id=1, epoch=1, term=5), NOW, False),
    ],
)
def test_the_same_trainer_or_a_later_one_may_replace(written_under: Fence | None, fence: Fence, may: bool) -> None:
    assert may_replace(written_under, fence) is may


def test_the_next_term_lies_above_all_terms_and_changes_so_far() -> None:
    assert (last_term(None, 3), last_term(NOW, 3), last_term(NOW, 9)) == (3, 5, 9)


class Contended:
    """A pointer that others replace `times` before each swap; `loses_reply` swaps and says that it did not."""

    def __init__(self, times: int, *, loses_reply: bool = False) -> None:
        self.text, self.times, self.loses_reply = b"0", times, loses_reply

    def pointer(self) -> Any:
        class At:
            content = self.text

        return At

    def compare_and_swap(self, after: bytes, *, expected: Any) -> bool:
        if self.times:
            self.times -= 1
            self.text += b"x"
        if expected.content != self.text:
            return False
        self.text = after
        return not self.loses_reply


def test_an_update_is_made_of_the_text_that_it_really_replaces() -> None:
    store = Contended(3)
    assert update_pointer(store, lambda text: (text or b"") + b"!") == b"0xxx!"  # type: ignore[arg-type]
    assert store.text == b"0xxx!"
    assert update_pointer(store, lambda text: None) is None and store.text == b"0xxx!"  # type: ignore[arg-type]


def test_a_swap_whose_reply_was_lost_counts() -> None:
    store = Contended(0, loses_reply=True)
    calls: list[bytes | None] = []

    def change(text: bytes | None) -> bytes:
        calls.append(text)
        return (text or b"") + b"!"

    assert update_pointer(store, change) == b"0!" and calls == [b"0"]  # type: ignore[arg-type]


def test_a_pointer_that_never_rests_is_given_up_after_many_attempts() -> None:
    store = Contended(1_000)
    with pytest.raises(StoreUnavailable, match="replaced 100 times"):
        update_pointer(store, lambda text: (text or b"") + b"!")  # type: ignore[arg-type]
    assert store.text == b"0" + b"x" * 100


def test_whoever_is_refused_hears_both_terms() -> None:
    for ours, told in ((OLD, "ours: term 4, producer 1, epoch 0"), (None, "ours: none")):
        with pytest.raises(Fenced, match=rf"the release belongs to a later trainer \(term 5, .*{told}"):
            refuse_smaller_fence(NOW, ours, subject="the release belongs to")
    refuse_smaller_fence(NOW, NOW, subject="x")
    refuse_smaller_fence(None, None, subject="x")
