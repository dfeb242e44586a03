"""The benchmarks, small, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def run_bench(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "streams", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_small_run_measures_the_whole_path() -> None:
    result = run_bench("encode", "--items", "128")
    assert result["items_per_second"] > 0
    assert result["ratio_to_limit"] > 0
    assert result["peak_memory_bytes"] > 2**20
    assert (result["batch"], result["device"], result["items"]) == (16, "cpu", 128)
    by_url = result["pictures_by_url"]
    assert (by_url["latency_seconds"], by_url["error_share"], by_url["batch"]) == (0.3, 0.02, 16)
    assert by_url["first_try_share"] >= 0.97  # of 128 items
    assert by_url["items_per_second"] > 0
    assert [cell["measured_items"] for cell in result["sweep"]]
    text = {one["precision"]: one["lowest_cosine"] for one in result["precisions"] if one["tower"] == "text"}
    assert text["bf16"] > 0.999


def test_a_small_run_asks_the_real_server_and_the_floor() -> None:
    sizes = ["--candidates", "20", "--history", "10", "--items", "100", "--requests", "5"]
    result = run_bench("score", *sizes)
    assert [cell["clients"] for cell in result["by_clients"]] == [1, 8]
    for cell in result["by_clients"]:
        assert cell["requests"] == 50 and 0 < cell["p50_ms"] <= cell["p99_ms"] and cell["floor_p50_ms"] > 0
    assert result["ratio_to_floor"] == max(cell["ratio_to_floor"] for cell in result["by_clients"])
    for cell in result["queries_by_clients"]:
        assert cell["p50_ms"] > 0 and 0 < cell["hit_ratio"] <= result["query_hit_ratio"]
        assert 0 < cell["miss_ratio"] <= result["query_miss_ratio"]
