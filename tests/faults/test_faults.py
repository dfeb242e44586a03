"""A few rounds of faults, as many as a build has time for; `python -m tests.faults` runs them by the hundred."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streams.settings import load_settings
from streams.stack.run import RunningStack, running_stack
from streams.training.scores import SCORES_FOLDER, ScoreFiles
from tests.faults import checks
from tests.faults.checks import rows_learned
from tests.faults.oracle import Logged, expected_behaviours, expected_items
from tests.faults.planted import BUGS
from tests.faults.processes import Starter
from tests.faults.rounds import Rounds
from tests.faults.scenario import FAULTS, Fault, plan_round
from trainer.metrics import ScoredRows

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_a_round_is_its_seed() -> None:
    assert plan_round(7, 3) == plan_round(7, 3)
    assert plan_round(7, 3) != plan_round(8, 3) != plan_round(8, 4)
    drawn = {fault for number in range(150) for fault in plan_round(number, 1).faults}
    assert drawn == set(FAULTS)


def test_the_truth_is_the_last_good_word_on_each_item() -> None:
    good = b'{"item_id": "a", "title": "%d", "published_at": "2025-01-01T00:00:00Z"}'
    records = [
        Logged(0, 0, b"a", good % 1),
        Logged(0, 1, b"a", good % 2),
        Logged(0, 2, b"a", b"{"),
        Logged(0, 3, b"b", good % 3),  # says that it is a
        Logged(0, 4, b"c", None),
    ]
    found = expected_items({0: records})
    assert found.held == {"a": records[1]} and found.gone == {"c"} and set(found.broken) == {(0, 2), (0, 3)}


def test_the_truth_across_partitions_is_told_by_time() -> None:
    good = b'{"item_id": "a", "title": "%d", "published_at": "2025-01-01T00:00:00Z"}'
    publish, deletion = Logged(0, 5, b"a", good % 1, 10), Logged(1, 0, b"a", None, 11)
    assert expected_items({0: [publish], 1: [deletion]}).gone == {"a"}
    assert expected_items({0: [publish], 1: [deletion._replace(time_ms=9)]}).held == {"a": publish}
    assert expected_items({0: [publish], 1: [deletion._replace(time_ms=10)]}).gone == {"a"}
    later = Logged(0, 6, b"a", good % 2, 3)  # its producer's clock stepped back
    assert expected_items({0: [publish._replace(time_ms=12), later], 1: [deletion]}).held == {"a": later}


def test_a_round_has_every_way_of_sending_and_late_pictures() -> None:
    sent = [one for number in range(8) for burst in plan_round(number, 1).bursts for one in burst]
    assert {one.way for one in sent if one.topic == "items"} == {"plain", "crc32", "committed", "aborted"}
    assert any(b"image_url" in (one.value or b"") for one in sent)


def test_the_truth_knows_late_and_repeated_behaviours() -> None:
    text = '{"event_id": "%s", "kind": "%s", "user_id": "u", "item_id": "i", "occurred_at": "%s", "exposure_id": "e1"}'
    events = [
        ("e1", "exposure", "2025-01-01T00:01:00+00:00"),
        ("e1", "exposure", "2025-01-01T00:01:00+00:00"),
        ("t1", "click", "2025-01-01T00:01:05+00:00"),
        ("e2", "exposure", "2025-01-01T00:00:40+00:00"),
        ("e3", "exposure", "2025-01-01T00:00:30+00:00"),
    ]
    log = [Logged(0, at, b"u", (text % event).encode()) for at, event in enumerate(events)]
    found = expected_behaviours({0: [*log, Logged(0, 9, b"u", b"{")]})
    assert (found.records, found.repeated, found.late, len(found.broken)) == (6, 1, 1, 1)
    assert [row.label for row in found.rows] == [0, 1] and found.histories == {"u": [("i", 1735689665.0)]}


def test_rows_are_those_of_each_folder_up_to_where_the_next_one_goes_on(tmp_path: Path) -> None:
    def learn(folder: str, scored: int | None, seconds: range) -> None:
        files = ScoreFiles(tmp_path / folder / SCORES_FOLDER)
        files.open(scored)
        if seconds:
            files.add([scored_rows(seconds)])
        files.flush()

    states = [tmp_path / folder for folder in ("a", "b", "c")]
    learn("a", None, range(5))
    learn("a", 3, range(3, 8))  # killed, and started again from a snapshot of its own
    learn("b", 6, range(0))  # took over and was killed before it had learned anything
    learn("c", 6, range(6, 9))
    assert [row.second for row in rows_learned(states)] == list(range(9))


def scored_rows(seconds: range) -> ScoredRows:
    """Rows of these event times."""
    count = len(seconds)
    names = np.full(count, "u")
    labels, ages = np.zeros(count, np.int8), np.zeros(count)
    never = np.zeros(count, bool)
    return ScoredRows(names, names, np.array(seconds), labels, ages, never, never, {"ciubm": ages})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningStack, Starter, Path]]:
    """A stack and an interpreter that forks processes, for all rounds."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    folder = tmp_path_factory.mktemp("faults")
    with running_stack(folder / "stack", load_settings().stack) as stack, Starter(folder / "processes") as starter:
        yield stack, starter, folder
    logging.getLogger("aiokafka").setLevel(logging.NOTSET)


def run(
    parts: tuple[RunningStack, Starter, Path], name: str, plans: list[tuple[Fault, ...]], bug: str | None
) -> list[str]:
    """Violations of these rounds, one after the other."""

    async def all_rounds() -> list[str]:
        stack, starter, folder = parts
        rounds = Rounds(stack, starter, folder, name=name, bug=bug)
        try:
            found: list[str] = []
            for number, faults in enumerate(plans, start=1):
                report = await rounds.run(number, random.Random(name).randrange(1_000), faults)
                print(report.as_json())
                found += report.violations
            return found
        finally:
            await rounds.close()

    return asyncio.run(all_rounds())


def test_nothing_is_lost_and_nothing_is_done_twice(parts: tuple[RunningStack, Starter, Path]) -> None:
    plans: list[tuple[Fault, ...]] = [("kill index", "kill broker"), ("kill train", "kill record"), ("kill milvus",)]
    assert run(parts, "ci", plans, None) == []


def test_a_planted_bug_is_found_and_named(
    parts: tuple[RunningStack, Starter, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "event_id ignored"
    bug = BUGS[name]
    monkeypatch.setattr(checks, "SETTLE_SECONDS", 10.0)  # what is wrong stays wrong however long one waits
    found = run(parts, "planted", [(bug.shown_by,)], name)
    assert any(sign in violation for violation in found for sign in bug.signs), found
