"""What checkpoints promise about users who asked to be forgotten."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from streams.stores.artifacts.checkpoints import Checkpoint
from streams.training.checkpointing import Checkpointer
from streams.training.scores import ScoreFiles
from streams.training.trainer_thread import TrainerThread
from tests.factories.checkpoints import make_checkpointer
from tests.factories.promotion import LOG
from tests.factories.training import (
    ALL,
    ListedInput,
    ToldAtOnce,
    forgotten,
    make_log,
    make_loop,
    make_thread,
    trained,
    vectors,
)
from trainer.samples.forgotten import ForgottenUsers


def make_run(folder: Path) -> tuple[ListedInput, TrainerThread, Checkpointer, Checkpoint | None]:
    checkpointer = make_checkpointer(folder, log=LOG)
    found = checkpointer.load()
    given = ListedInput(vectors(*ALL), make_log(300))
    given.fetched = 0 if found is None else found.meta.offsets["behaviours"][0]
    scores = ScoreFiles(folder / "scores")
    return given, make_thread(given, forgotten=ForgottenUsers("c", "t"), scores=scores), checkpointer, found


def names_on_disk(folder: Path) -> set[str]:
    return {name for path in (folder / "scores").iterdir() for name in pq.read_table(path)["user"].to_pylist()}


async def test_a_checkpoint_that_says_who_is_forgotten_leaves_no_name_on_disk_whatever_is_killed_after_it(
    tmp_path: Path,
) -> None:
    given, thread, checkpointer, found = make_run(tmp_path)
    await trained(make_loop(given, thread, checkpointer=checkpointer), found)
    assert found is None and "u3" in names_on_disk(tmp_path)
    await thread.to_forget([forgotten("u3", until=10_000)], "source", 1)
    assert await checkpointer.checkpoint(thread) and await checkpointer.written()
    assert "u3" not in names_on_disk(tmp_path)  # and here it is killed

    given, thread, checkpointer, found = make_run(tmp_path)
    follow = partial(ToldAtOnce, now=[forgotten("u3", until=10_000)], later=[])
    await trained(make_loop(given, thread, checkpointer=checkpointer, follow=follow), found)
    assert found is not None and "u3" not in names_on_disk(tmp_path) and "u4" in names_on_disk(tmp_path)
