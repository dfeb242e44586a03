"""What `mimstream trainset` says of a release whose rows and vectors are all there, and of one that lacks some."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams.settings import Settings
from streams.stores.artifacts.journal import JournalStore, SegmentMeta
from streams.wiring import trainset
from tests.factories.checkpoints import LOG, make_journal
from tests.factories.samples import DIM, click_log, make_trainer, small_config
from trainer.provenance.rebuild import Rebuild
from trainer.samples.join_rules import JoinRules

CONFIG = small_config(release_every_rows=64)
(EVENTS,) = click_log(300)


class Released:
    """A release of a small trainer: its journal, its manifest, and the log that it learned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        trainer = make_trainer(CONFIG)
        for offset, event in enumerate(EVENTS):
            trainer.intake.observe(0, offset, event)
        trainer.intake.finish()
        trainer.intake.advance()
        while trainer.step() is not None and not trainer.release_due():
            trainer.intake.advance()
        segment = trainer.journal.segment()
        self.folder = folder
        self.journal: JournalStore = make_journal(folder)
        meta = SegmentMeta(
            segment_id=segment.name,
            root=segment.root,
            rows=segment.rows,
            encoder_version="enc-1",
            dim=DIM,
            cluster_id=LOG.cluster_id,
            topic_ids=LOG.topic_ids,
            begins={0: 0},
            ends={0: len(EVENTS)},
            rules=JoinRules.of(CONFIG, [0]).settings,
        )
        self.journal.write(segment, meta)
        self.manifest = SimpleNamespace(release_id="r1", segment=segment.name, rows_tree_sha256=segment.root)
        self.asked: list[int] = []
        self.problems: list[str] = []

        async def read(_: Any, __: Any, rebuild: Rebuild, ___: Any, fetch: int) -> list[str]:
            self.asked.append(fetch)
            for offset, event in enumerate(EVENTS):
                rebuild.observe(0, offset, event)
            rebuild.advance(everything=True)
            return self.problems

        def find(_: Any, release: str) -> Any:
            assert release == "r1"
            return self.manifest

        for name, stub in (
            ("open_registry", lambda _: None), ("find_release", find), ("make_journal_store", lambda _: self.journal),
            ("describe_log", lambda _: self.log), ("_read_log", read),
        ):  # fmt: skip
            monkeypatch.setattr(trainset, name, stub)
        self.log = LOG

    def summary(self, *, fetch: int | None = None) -> dict[str, Any]:
        summary, rows = trainset.rebuild_release(Settings(), "r1", fetch_max_records=fetch)
        assert len(rows) == summary["rebuilt"]
        return summary


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Released:
    return Released(monkeypatch, tmp_path)


def test_a_release_whose_rows_and_vectors_are_there_is_verified(released: Released) -> None:
    summary = released.summary()
    assert summary["verified"] and summary["problems"] == []
    assert summary["rows"] == summary["rebuilt"] >= 64 and summary["erased"] == summary["first_row"] == 0
    assert summary["vectors"] > 0 and summary["users"] > 1 and summary["steps"] > 1
    assert (summary["release"], summary["rows_tree_sha256"]) == ("r1", released.manifest.rows_tree_sha256)
    released.summary(fetch=7)
    assert released.asked == [Settings().train.fetch_max_records, 7]


def test_a_release_of_which_vectors_are_lost_is_not_verified(released: Released) -> None:
    for pack in released.journal.present().packs:
        released.journal._vectors.delete(pack)
    summary = released.summary()
    assert not summary["verified"]
    (problem,) = summary["problems"]
    assert problem.startswith("vectors of ") and "are not archived any more" in problem and problem.count(", ") == 5


def test_a_release_whose_log_lost_events_or_whose_rows_differ_is_not_verified(released: Released) -> None:
    released.problems = ["the log does not hold offsets 1 to 5"]
    summary = released.summary()
    assert not summary["verified"] and summary["problems"] == released.problems
    released.problems = []
    released.manifest.rows_tree_sha256 = "0" * 64
    assert not released.summary()["verified"]


def test_a_log_of_other_topics_is_not_read(released: Released) -> None:
    released.log = SimpleNamespace(has_incarnations=lambda *_: False, cluster_id="other")  # type: ignore[assignment]
    summary = released.summary()
    assert not summary["verified"] and released.asked == []
    assert any("was trained from other topics" in problem for problem in summary["problems"])


@pytest.mark.parametrize("lacks", ["segment", "rows_tree_sha256"])
def test_a_release_without_a_journal_is_told(released: Released, lacks: str) -> None:
    setattr(released.manifest, lacks, None)
    with pytest.raises(Misconfigured, match="r1 was made before there was a journal"):
        released.summary()
