"""Records of the topic `skew` that no server and no trainer writes."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from schemas.skew import SkewRecord
from streams.commands import skew as skew_command
from streams.training.skew_report import SkewFound, summary
from tests.factories.serving import FEATURES, open_bench
from tests.factories.skew_scene import Scene, scene

__all__ = ["open_bench", "scene"]


async def test_a_row_with_times_beyond_all_clocks_ends_no_training(scene: Scene) -> None:
    await scene.write(until=40)
    await scene.ask()
    (value,) = scene.bench.service.skew.waiting
    record = SkewRecord.model_validate_json(value)
    assert record.served is not None
    served = record.served.model_copy(update={"now": 1 << 70})
    with capture_logs() as logs:
        scene.watch.hear(record.model_copy(update={"served": served}).model_dump_json().encode())
        found = scene.compare()
    assert [line["event"] for line in logs] == ["train.skew_unreadable"]
    assert found is not None and found.outcome is not None and found.outcome.rows == 4


async def test_rows_whose_values_do_not_fit_are_told_whatever_state_they_name_and_not_kept(scene: Scene) -> None:
    await scene.write(until=40)
    await scene.ask()
    (value,) = scene.bench.service.skew.waiting
    record = SkewRecord.model_validate_json(value)
    assert record.served is not None
    plain = json.loads(value)
    changes: list[dict[str, Any]] = [
        {"values": plain["served"]["values"][4:]},
        {"values": "", "number": 99},
        {"targets": ["boot"] * 101, "probabilities": [0.5] * 101},
        {"probabilities": [*plain["served"]["probabilities"], 0.5]},
        {"history_seconds": [*plain["served"]["history_seconds"], 0]},
        {"history": ["boot", *plain["served"]["history"]]},
        {"history": ["boot"] * 1_001, "history_seconds": [0] * 1_001},
        {"release_id": "r" * 201},
        {"number": 1 << 60},
    ]
    with capture_logs() as logs:
        for change in changes:
            scene.watch.hear(json.dumps(plain | {"served": plain["served"] | change}).encode())
        scene.watch.hear(json.dumps(plain | {"features": "0" * 16, "served": plain["served"] | changes[0]}).encode())
    assert [line["event"] for line in logs] == ["train.skew_unreadable"] * len(changes)
    assert not scene.watch._requests


async def test_values_that_are_not_finite_differ(scene: Scene) -> None:
    await scene.write(until=40)
    await scene.ask()
    (value,) = scene.bench.service.skew.waiting
    plain = json.loads(value)
    values = np.full(len(FEATURES.names) * len(plain["served"]["targets"]), np.nan, "<f4")
    values[::2] = np.inf
    plain["served"]["values"] = base64.b64encode(values.tobytes()).decode()
    scene.bench.service.skew.waiting[0] = json.dumps(plain).encode()
    found = scene.compare()
    assert found is not None and found.outcome is not None and found.outcome.differing == found.outcome.rows == 4
    assert json.loads(found.model_dump_json())["outcome"]["largest"].keys() == set(FEATURES.names)


OUTCOME = {
    "number": 1,
    "releases": ["\x1b[31m<b>"],
    "rows": 4,
    "differing": 0,
    "tolerance": 0.001,
    "largest": {"\x1b[31m[/x]": 0.5},
    "compared_at": "2026-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    "change",
    [
        *('"rows": 1' + "0" * 400, '"differing": 9007199254740993', '"number": 0', '"tolerance": Infinity'),
        *('"tolerance": NaN', '"largest": {"takes": 1e999}', '"largest": {"takes": NaN}'),
    ],
    ids=lambda change: change[:25],
)
def test_an_outcome_with_numbers_that_are_none_is_in_no_report(change: str) -> None:
    found = SkewFound()
    plain = json.dumps({"features": FEATURES.version, "outcome": OUTCOME})
    found.hear(plain.encode())
    found.hear((plain[:-2] + f", {change}}}}}").encode())  # of two fields of a name the last one counts
    assert len(found.outcomes) == 1
    json.dumps(summary(found, limit=0.01), allow_nan=False)


def test_texts_of_an_outcome_act_on_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = SkewFound()
    found.hear(json.dumps({"features": FEATURES.version, "outcome": OUTCOME}).encode())
    skew_command._print(summary(found, limit=0.01))
    assert "\x1b" not in (shown := capsys.readouterr().out) and "[31m[/x]" in shown
