"""The scoring benchmark, small, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def test_a_small_run_asks_the_real_server_and_the_floor() -> None:
    sizes = ["--candidates", "20", "--history", "10", "--items", "100", "--requests", "5"]
    command = [sys.executable, "-m", "streams", "bench", "score", *sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert [cell["clients"] for cell in result["by_clients"]] == [1, 8]
    for cell in result["by_clients"]:
        assert cell["requests"] == 50 and 0 < cell["p50_ms"] <= cell["p99_ms"] and cell["floor_p50_ms"] > 0
    assert result["ratio_to_floor"] == max(cell["ratio_to_floor"] for cell in result["by_clients"])
