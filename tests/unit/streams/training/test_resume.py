"""What snapshots promise about users who asked to be forgotten."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from streams.training.checkpointing import Checkpoints
from streams.training.loop import TrainOnBehaviours
from streams.training.scores import ScoreFiles
from tests.factories.checkpoints import OLD, make_journal, make_store
from tests.factories.promotion import LOG
from tests.factories.training import (
    ALL,
    ListedInput,
    ToldAtOnce,
    forgotten,
    make_log,
    make_loop,
    trained,
    vectors,
)
from trainer.samples.forgotten import ForgottenUsers


def make_run(folder: Path, told: list[str], *, resumes: bool = False) -> TrainOnBehaviours:
    snapshots = Checkpoints(
        make_store(folder),
        make_journal(folder),
        read_log=lambda: LOG,
        config={},
        encoder_version=None,
        fence=OLD,
        clock=lambda: 1e9,
    )
    found = snapshots.resume()
    assert (found is not None) == resumes
    given = ListedInput(vectors(*ALL), make_log(300))
    given.fetched = 0 if found is None else found.meta.offsets["behaviours"][0]
    return make_loop(
        given,
        gone=ForgottenUsers("c", "t"),
        follow_forgotten=lambda tell: ToldAtOnce(tell, [forgotten(user, until=10_000) for user in told], []),
        scores=ScoreFiles(folder / "scores"),
        snapshots=snapshots,
        resume=found,
    )


def names_on_disk(folder: Path) -> set[str]:
    return {name for path in (folder / "scores").iterdir() for name in pq.read_table(path)["user"].to_pylist()}


async def test_a_snapshot_that_says_who_is_forgotten_leaves_no_name_on_disk_whoever_is_killed_after_it(
    tmp_path: Path,
) -> None:
    loop = make_run(tmp_path, [])
    await trained(loop)
    assert "u3" in names_on_disk(tmp_path)
    await loop._turns.to_forget([forgotten("u3", until=10_000)], "source", 1)
    keeping = loop._resuming.keeping
    assert keeping is not None and await loop._resuming.snapshot() and await keeping.written()
    assert "u3" not in names_on_disk(tmp_path)  # and here it is killed

    await trained(make_run(tmp_path, ["u3"], resumes=True))
    assert "u3" not in names_on_disk(tmp_path) and "u4" in names_on_disk(tmp_path)
