"""The journal of two trainers: a superseded one deletes nothing that its successor needs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import Misconfigured
from schemas.manifests import Fence
from streams.stores.artifacts.artifact_store import NotFound
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


@pytest.mark.parametrize("writer", [OLD, None])
def test_a_segment_refers_to_no_vectors_that_an_earlier_trainer_may_delete(
    tmp_path: Path, writer: Fence | None
) -> None:
    names = [f"item-{n}" for n in range(4)]
    old, new = make_journal(tmp_path), make_journal(tmp_path)
    write(old, using(1, names), writer)
    among = old.present()
    write(new, ours := using(2, names), NEW)  # the very same vectors
    assert set(new.load(ours.name).meta.packs).isdisjoint(among.packs)
    for pack in among.packs:  # the other had listed what is needed before
        new._vectors.delete(pack)
    assert_whole(make_journal(tmp_path), ours)


def test_vectors_that_went_with_their_last_release_are_written_again_for_the_next(tmp_path: Path) -> None:
    journal, names = make_journal(tmp_path), [f"item-{n}" for n in range(4)]
    write(journal, using(1, names), OLD)
    journal.retain(set(), journal.present(), OLD)
    assert (list(journal.present().segments), list(journal.present().packs)) == ([], [])
    write(journal, again := using(2, names), OLD)
    assert_whole(journal, again)


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


def test_a_segment_that_is_gone_or_damaged_is_told_with_its_name(tmp_path: Path, segments: list[Segment]) -> None:
    journal = make_journal(tmp_path)
    name = write(journal, segments[0], OLD)
    folder = tmp_path / "journal" / name
    with pytest.raises(Misconfigured, match="is no id of a journal segment"):
        journal.load("../snapshots")
    with pytest.raises(NotFound):
        journal.load("s999999999-000000000000")
    for file in ("segment.safetensors", "values.json", "segment.json"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(b"{}" if file == "segment.json" else content + b" ")
        with pytest.raises(Misconfigured, match=f"segment {name} in here is damaged: .*restore it"):
            journal.load(name)
        (folder / file).write_bytes(content)
    assert journal.load(name).segment.root == segments[0].root


def test_what_nobody_can_say_the_writer_of_goes_with_the_next_trainer(tmp_path: Path, segments: list[Segment]) -> None:
    journal = make_journal(tmp_path)
    damaged, kept = write(journal, segments[0], NEW), write(make_journal(tmp_path), segments[1], OLD)
    (tmp_path / "journal" / damaged / "segment.json").write_text('{"packs": []}')
    for pack in make_journal(tmp_path).present().packs:
        (tmp_path / "vectors" / pack / "writer.json").unlink()  # as a version without this file wrote it
    needed = journal.load(kept).meta.packs
    journal.retain({kept}, journal.present(), OLD)
    left = journal.present()
    assert left.segments == [kept] and left.packs == needed


def test_vectors_whose_pack_is_gone_are_passed_over_and_the_others_read(
    tmp_path: Path, segments: list[Segment]
) -> None:
    journal = make_journal(tmp_path)
    write(journal, using(0, [f"item-{i}" for i in range(4)]), OLD)
    last = using(1, [f"item-{i}" for i in range(2, 8)])
    write(journal, last, OLD)
    meta = journal.load(last.name).meta
    assert len(meta.packs) == 2 and journal.vectors(meta).keys() >= last.archive.keys()
    shutil.rmtree(tmp_path / "vectors" / meta.packs[0])
    assert len(journal.vectors(meta)) == 4


@pytest.mark.parametrize(
    ("writer", "other", "listed"),
    [(OLD, NEW, "packs"), (OLD, NEW, "segments"), (NEW, OLD, "packs"), (NEW, OLD, "all")],
)
def test_vectors_whose_segment_is_not_there_yet_are_left_by_whoever_may_not_know_of_it(
    tmp_path: Path, writer: Fence, other: Fence, listed: str
) -> None:
    slow, quick = make_journal(tmp_path), make_journal(tmp_path)
    segment, put, late = using(1, ["a", "b"]), slow._segments.put, list[Any]()
    slow._segments.put = lambda *entry: late.append(entry)  # type: ignore[method-assign]
    store = {"packs": quick._vectors, "segments": quick._segments}.get(listed)

    def begins() -> None:
        if not late:
            write(slow, segment, writer)

    if store is None:
        begins()  # before anything is listed
    else:
        names = store.names

        def then_begins() -> list[str]:
            found = names()
            begins()
            return found

        store.names = then_begins  # type: ignore[method-assign]
    quick.retain(set(), quick.present(), other)
    put(*late[0])
    assert_whole(make_journal(tmp_path), segment)
