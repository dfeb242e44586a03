"""The encoding benchmark, small, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def test_a_small_run_measures_the_whole_path() -> None:
    command = [sys.executable, "-m", "streams", "bench", "encode", "--items", "128", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["items_per_second"] > 0
    assert result["ratio_to_limit"] > 0
    assert result["peak_memory_bytes"] > 2**20
    assert (result["batch"], result["device"], result["items"]) == (16, "cpu", 128)
    assert [cell["measured_items"] for cell in result["sweep"]]
    text = {one["precision"]: one["lowest_cosine"] for one in result["precisions"] if one["tower"] == "text"}
    assert text["bf16"] > 0.999
