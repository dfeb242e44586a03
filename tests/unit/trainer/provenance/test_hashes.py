"""What the two hashes of training cover, field by field: each has to change them, and what is no content must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from tests.factories.feeding import through_bytes
from tests.factories.samples import DAY0, embedding, make_catalogue
from trainer.negatives.sampler import ContrastivePlan
from trainer.online.progress import TrainProgress
from trainer.provenance.journal import Journal, Leaf, Segment, StepRows, VectorUse, root_of, row_text
from trainer.samples.catalogue import Catalogue, vector_digest
from trainer.samples.forgotten import ForgottenUsers
from trainer.samples.id_hashes import id_hashes
from trainer.samples.recent_ids import id_hash
from trainer.samples.rows import RELIABILITY, Impression


def row(event_id: str, item: int, *, user: str = "u1", label: int = 0) -> Impression:
    return Impression(event_id, 0, 7, DAY0 + 50, user, item, (3, 4), (DAY0 + 1, DAY0 + 2), False, False, label)


@dataclass
class Training:
    """Two steps of two rows each, the first against negatives; a change is made to a copy before it is learned."""

    catalogue: Catalogue = field(default_factory=lambda: make_catalogue(12))
    steps: list[list[Impression]] = field(
        default_factory=lambda: [
            [row("a", 1, label=1), row("b", 2, user="u2")],
            [row("c", 5), row("d", 6, user="u2", label=1)],
        ]
    )
    negatives: list[list[int] | None] = field(default_factory=lambda: [[7, 8], None])
    first_step: int = 0

    def learned(self) -> tuple[str, str]:
        """The journal's root and the rows' chain."""
        journal, progress = Journal(), TrainProgress(self.catalogue)
        for number, (rows, drawn) in enumerate(zip(self.steps, self.negatives, strict=True), self.first_step):
            none = np.zeros(0, np.int64)
            plan = None
            if drawn is not None:
                empty = np.zeros((0, len(drawn)), bool), np.zeros(len(drawn), np.float32), np.zeros(0, np.float32)
                plan = ContrastivePlan(none, none, np.array(drawn, np.int64), *empty)
            seen = np.array(sorted({0, *(item for one in rows for item in (one.item, *one.history)), *(drawn or ())}))
            journal.record(number, rows, plan, seen, self.catalogue)
            progress.add(rows, plan, {"ciubm": np.zeros(len(rows))})
        segment = Segment.from_state(through_bytes(journal.segment().to_state()))
        assert segment.root == journal.segment().root
        return segment.root, progress.rows_sha256

    def change(self, step: int, place: int, **values: object) -> None:
        self.steps[step][place] = replace(self.steps[step][place], **values)


def another_content(training: Training) -> None:
    training.catalogue.put_embedding(embedding("i5", 5, content="other words, same vector"))


def another_vector(training: Training) -> None:
    training.catalogue.put_embedding(embedding("i5", 99))


def no_vector(training: Training) -> None:
    training.catalogue.delete_item("i5")


def users_exchanged(training: Training) -> None:
    training.change(0, 0, user_id="u2")
    training.change(0, 1, user_id="u1")


def items_exchanged(training: Training) -> None:
    training.change(0, 0, item=2)
    training.change(0, 1, item=1)


def other_order_of_a_users_rows(training: Training) -> None:
    for one, other in ((0, 0), (0, 1)):
        training.steps[0][one], training.steps[1][other] = training.steps[1][other], training.steps[0][one]


def negatives_at_another_step(training: Training) -> None:
    training.negatives.reverse()


def steps_merged_but_for_a_row(training: Training) -> None:
    training.steps = [[*training.steps[0], training.steps[1][0]], training.steps[1][1:]]


def later_steps(training: Training) -> None:
    training.first_step = 9


BOTH, ROOT, NEITHER = (True, True), (True, False), (False, False)
CHANGES: dict[str, tuple[Callable[[Training], object], tuple[bool, bool]]] = {
    "event id": (lambda t: t.change(0, 0, event_id="z"), BOTH),
    "item": (items_exchanged, BOTH),
    "another item": (lambda t: t.change(0, 0, item=2), BOTH),
    "label": (lambda t: t.change(0, 1, label=1), BOTH),
    "user": (users_exchanged, BOTH),
    "history": (lambda t: t.change(1, 0, history=(3, 1)), ROOT),
    "order of the history": (lambda t: t.change(1, 0, history=(4, 3)), ROOT),
    "times of the history": (lambda t: t.change(1, 0, history_seconds=(DAY0 + 1, DAY0 + 3)), ROOT),
    "a negative": (lambda t: t.negatives[0].__setitem__(1, 9), BOTH),  # type: ignore[union-attr]
    "no negatives": (lambda t: t.negatives.__setitem__(0, None), BOTH),
    "step of the negatives": (negatives_at_another_step, BOTH),
    "order of a user's rows": (other_order_of_a_users_rows, BOTH),
    "where a step ends": (steps_merged_but_for_a_row, BOTH),
    "vector": (another_vector, ROOT),
    "content": (another_content, ROOT),
    "no vector": (no_vector, ROOT),
    "step of a vector": (later_steps, ROOT),
    "query": (lambda t: t.change(0, 0, query_text="words"), NEITHER),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hash_covers(name: str) -> None:
    change, covered = CHANGES[name]
    training = Training()
    change(training)
    before, after = Training().learned(), training.learned()
    assert tuple(one != other for one, other in zip(before, after, strict=True)) == covered


def test_the_root_covers_leaves_their_lengths_negatives_and_vectors_and_no_order_of_leaves() -> None:
    leaves = [Leaf(b"\1" * 32, 2), Leaf(b"\2" * 32, 1)]
    root = root_of(leaves, b"n", b"v")
    assert root == root_of(leaves[::-1], b"n", b"v")
    others = [
        root_of(leaves[:1], b"n", b"v"),
        root_of([Leaf(b"\1" * 32, 3), leaves[1]], b"n", b"v"),
        root_of([Leaf(b"\3" * 32, 2), leaves[1]], b"n", b"v"),
        root_of(leaves, b"m", b"v"),
        root_of(leaves, b"n", b"w"),
    ]
    assert len({root, *others}) == 6


USE = VectorUse(step=1, item="i", digest=b"d", content="c", published_at=1.0)


@pytest.mark.parametrize("change", [{"step": 2}, {"item": "j"}, {"digest": b"e"}, {"digest": b""}, {"content": "d"}])
def test_of_a_vector_the_root_covers(change: dict[str, Any]) -> None:
    before, after = Segment(vectors=[USE, USE]), Segment(vectors=[USE, replace(USE, **change)])
    assert before.root != after.root
    assert before.root == Segment(vectors=[USE, replace(USE, published_at=2.0)]).root


def steps_against(*negatives: list[str] | None) -> Segment:
    rows = np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    return Segment(steps=[StepRows(*rows, one) for one in negatives])


def test_of_negatives_the_root_covers_which_they_are_their_order_and_their_step() -> None:
    plans = (
        (["a", "b"], ["c"]),
        (["a", "bc"], None),
        (["a"], ["b", "c"]),
        (["b", "a"], ["c"]),
        (["a", "b"], ["d"]),
        (["a", "b"], None),
    )
    roots = [steps_against(*plan).root for plan in plans]
    assert len(set(roots)) == len(plans)
    back = Segment.from_state(through_bytes(steps_against(["b", "a"], None, []).to_state()))
    assert [step.negatives for step in back.steps] == [["b", "a"], None, []]


def test_a_row_that_was_drawn_is_kept_by_its_number_and_one_beside_a_take_with_its_item() -> None:
    catalogue, journal = make_catalogue(6), Journal()
    rows = [replace(row(f"e{draw}", item), draw=draw) for item, draw in ((1, 0), (2, 1), (5, 2), (6, 3))]
    journal.record(0, rows, None, np.array([1]), catalogue)
    segment = Segment.from_state(through_bytes(journal.segment().to_state()))
    assert segment.steps[0].places.tolist() == [[0, 7, 0], [0, 7, 1], [0, 7, 2], [0, 7, 3]]
    assert segment.drawn == {(0, 7, 2): "i5", (0, 7, 3): "i6"} and segment.rows == 4
    assert segment.name == f"s000000000-{segment.root[:12]}"


def test_a_vector_is_recorded_once_a_segment_and_again_where_it_changed() -> None:
    catalogue, journal = make_catalogue(4), Journal()
    rows, seen = [row("a", 1)], np.array([0, 1, 2])
    journal.record(0, rows, None, seen, catalogue)
    journal.record(1, rows, None, seen, catalogue)
    catalogue.put_embedding(embedding("i2", 50))
    again = Journal()
    again.restore(through_bytes(journal.snapshot()))
    for each in (journal, again):
        each.record(2, rows, None, seen, catalogue)
        assert [(use.step, use.item) for use in each.segment().vectors] == [(0, "i1"), (0, "i2"), (2, "i2")]
        assert set(each.segment().archive) == {use.digest for use in each.segment().vectors}
        assert each.cut(rows=3, steps=3).rows == 3
        each.record(3, rows, None, seen, catalogue)
        segment = each.segment()
        assert [(use.step, use.item) for use in segment.vectors] == [(3, "i1"), (3, "i2")]
        assert (segment.first_row, segment.first_step) == (3, 3) and segment.name.startswith("s000000003-")


def test_a_forgotten_users_leaf_stays_without_the_user_over_a_restart() -> None:
    catalogue, journal, again = make_catalogue(6), Journal(), Journal()
    journal.record(0, [row("a", 1), row("b", 2, user="gone")], None, np.array([1]), catalogue)
    root = journal.segment().root
    journal.forget("gone")
    again.restore(through_bytes(journal.snapshot()))
    assert journal.segment().root == again.segment().root == root
    for each in (journal, again):  # who comes back under that id begins a leaf of their own
        each.record(1, [row("c", 3, user="gone"), row("d", 4)], None, np.array([1]), catalogue)
        assert sorted(leaf.rows for leaf in each.segment().leaves) == [1, 1, 2]


def test_an_item_that_was_given_a_second_number_is_one_item() -> None:
    catalogue, journal = Catalogue(8), Journal()
    catalogue.put_embedding(embedding("i", 1))
    first = catalogue.number("i")
    journal._record_vector(1, first, catalogue)
    catalogue.retire(())
    second = catalogue.number("i")
    assert second != first
    catalogue.put_embedding(embedding("i", 2))
    journal._record_vector(2, second, catalogue)
    again = Journal()
    again.restore(through_bytes(journal.snapshot()))
    catalogue.put_embedding(embedding("i", 1))
    for one in (journal, again):
        one._record_vector(3, first, catalogue)
        assert [use.step for use in one.segment().vectors] == [1, 2, 3]


def test_hashes_are_those_that_releases_snapshots_and_erasures_were_kept_with() -> None:
    assert id_hashes("item-17") == (3413445538853364867, 7542785179641482432)
    assert id_hash("event-17") == 6958542774133541185
    assert vector_digest("c", np.array([1, -2], np.float32)).hex() == "1797dfe8418b087aff0decf1e6a26efa"
    leaf = Leaf()
    leaf.add(row_text("e", "i", "1", ["a", "b"], [7, 8]))
    leaf.add(row_text("f", "j", "0", [], []))
    assert (leaf.digest.hex(), leaf.rows) == ("b80727fd03186f70b04611501b74f8e2995a1e404cb9e6cc294b013dbe742f9a", 2)
    segment = Segment(first_row=3, vectors=[VectorUse(1, "i", b"d", "c", 1.0)], leaves=[leaf])
    segment.steps = steps_against(["a", "b"], None).steps
    assert segment.root == "b55c5077d13d50287473132d24dab551fa92b8f917fcfbef21f01da006b51a6f"
    assert segment.name == "s000000003-b55c5077d13d"
    forgotten = ForgottenUsers("c", "t")
    forgotten.restore({"aa09beec600fe1f19a1842ac74124240": {"0": 5}})
    assert forgotten.erases("somebody", 0, 4)
    assert RELIABILITY == {"exposure": 0, "click": 1, "cart": 2, "purchase": 3}
