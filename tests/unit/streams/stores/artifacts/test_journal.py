"""The journal of two trainers: a superseded one deletes nothing that its successor needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from schemas.manifests import Fence
from streams.stores.artifacts.journal import JournalStore, SegmentMeta
from tests.factories.checkpoints import NEW, OLD, make_journal
from tests.factories.samples import DIM, click_log, make_trainer, small_config
from trainer.provenance.journal import Segment, VectorUse


@pytest.fixture(scope="module")
def segments() -> list[Segment]:
    trainer = make_trainer(small_config(release_every_rows=64))

    def learned() -> Iterator[Segment]:
        for offset, event in enumerate(click_log(400)[0]):
            trainer.intake.observe(0, offset, event)
            trainer.intake.advance()
            while trainer.step() is not None:
                if trainer.release_due():
                    yield trainer.journal.segment()
                    trainer.begin_next()
                trainer.intake.advance()

    found = list(learned())
    assert len(found) >= 3
    return found


def write(journal: JournalStore, segment: Segment, fence: Fence | None) -> str:
    meta = SegmentMeta(
        segment_id=segment.name,
        root=segment.root,
        rows=segment.rows,
        encoder_version="enc-1",
        dim=DIM,
        cluster_id="c",
        topic_ids={},
        begins={},
        ends={},
        rules={},
        fence=fence,
    )
    journal.write(segment, meta)
    return segment.name


def assert_whole(journal: JournalStore, segment: Segment) -> None:
    found = journal.load(segment.name)
    assert found.segment.root == segment.root
    assert journal.vectors(found.meta).keys() >= {use.digest for use in segment.vectors if use.digest}


@pytest.mark.parametrize("asleep", ["before it lists", "before it asks for releases", "before it takes away"])
def test_a_superseded_trainer_leaves_its_successors_journal_and_vectors(
    tmp_path: Path, segments: list[Segment], asleep: str
) -> None:
    old, new = make_journal(tmp_path), make_journal(tmp_path)
    first, second = segments[:2]
    kept = {write(old, first, OLD)}
    if asleep == "before it lists":  # its release is not there yet when the old trainer asks
        write(new, second, NEW)
    among = old.present()
    if asleep == "before it asks for releases":
        kept.add(write(new, second, NEW))
    known = frozenset(kept)
    if asleep == "before it takes away":
        write(new, second, NEW)
    old.retain(known, among, OLD)
    for segment in (first, second):
        assert_whole(make_journal(tmp_path), segment)


def test_vectors_of_an_earlier_trainer_that_go_meanwhile_are_missed_by_nobody(
    tmp_path: Path, segments: list[Segment]
) -> None:
    old, new = make_journal(tmp_path), make_journal(tmp_path)
    write(old, segments[0], OLD)
    among = old.present()
    write(new, segments[1], NEW)  # many of its vectors are those of the first
    old.retain(set(), among, OLD)
    write(new, segments[2], NEW)
    for segment in segments[1:3]:
        assert_whole(make_journal(tmp_path), segment)


@pytest.mark.parametrize("writer", [OLD, None])
def test_what_an_earlier_trainer_left_goes_once_no_release_needs_it(
    tmp_path: Path, segments: list[Segment], writer: Fence | None
) -> None:
    journal = make_journal(tmp_path)
    write(make_journal(tmp_path), segments[0], writer)
    kept = write(journal, segments[1], NEW)
    before = journal.present()
    journal.retain({kept}, before, NEW)
    after = journal.present()
    assert after.segments == [kept] and after.packs == journal.load(kept).meta.packs and len(before.packs) == 2
    assert_whole(journal, segments[1])


def using(number: int, names: Iterable[str]) -> Segment:
    """A segment that saw the vectors of these items."""
    digests = {name: hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names}
    uses = [VectorUse(1, name, digest, "content", 0.0) for name, digest in digests.items()]
    return Segment(
        first_row=number,
        vectors=uses,
        archive={digest: np.full(DIM, number, np.float32) for digest in digests.values()},
    )


@pytest.mark.parametrize("restarted", [False, True])
def test_long_lived_vectors_keep_no_packs_of_dead_ones(tmp_path: Path, restarted: bool) -> None:
    journal, kept = make_journal(tmp_path), list[Segment]()
    for number in range(30):
        # each release brings ten vectors, of which one is used from then on
        fresh = [f"item-{number}-{i}" for i in range(10)]
        segment = using(number, [*fresh, *(f"item-{earlier}-0" for earlier in range(number))])
        kept = [*kept, segment][-3:]
        write(journal, segment, OLD)
        journal.retain({one.name for one in kept}, journal.present(), OLD)
        journal = make_journal(tmp_path) if restarted else journal
    for segment in kept:
        assert_whole(journal, segment)
    held = sum(len(journal._pack(name)["digests"]) for name in journal.present().packs)
    assert held <= 2 * sum(len(segment.archive) for segment in kept)
    assert len(journal.present().packs) <= 8


def test_a_pack_that_is_used_for_the_most_part_is_referred_to(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    items = [f"item-{i}" for i in range(10)]
    write(journal, using(0, items), OLD)
    write(journal, using(1, items[:5]), OLD)
    assert len(journal.present().packs) == 1
    write(journal, using(2, items[:4]), OLD)
    assert len(journal.present().packs) == 2
