"""The main job as a newcomer runs it, on a small set."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streams.demo.outcome import VARIANTS
from tests.factories.offline_folders import DAY, write

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

ITEMS, ROWS, USERS = 60, 1_500, 300


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 8, 3)).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((80, 120)).save(encoded, "JPEG")
    return encoded.getvalue()


def write_set(folder: Path) -> Path:
    """Three days of a small shop; most items have a picture, a third are published after the first day."""
    rng = np.random.default_rng(7)
    start = 1_700_000_000 // DAY * DAY
    publish = np.sort(rng.integers(0, 2 * DAY, ITEMS))
    publish[0] = 0
    item = rng.integers(0, ITEMS, ROWS)
    ts = start + np.maximum(np.sort(rng.integers(0, 3 * DAY, ROWS)), publish[item])
    order = np.argsort(ts, kind="stable")
    names = [f"shop-{number}" for number in range(ITEMS)]
    words = ["red dress", "blue jeans", "green hat", "wool scarf", "rain boots", "silk shirt"]
    write(
        folder,
        "items",
        item_id=names,
        title=[f"{words[n % 6]} number {n}" for n in range(ITEMS)],
        category=[words[n % 6] for n in range(ITEMS)],
        price=[float(n) for n in range(ITEMS)],
        publish_ts=start + publish,
    )
    pictured = [n for n in range(ITEMS) if n % 10]
    write(folder, "images", item_id=[names[n] for n in pictured], image=[picture(n) for n in pictured])
    users, taken = rng.integers(0, USERS, ROWS), [names[n] for n in item[order]]
    write(folder, "interactions", user_id=users, item_id=taken, ts=ts[order], label=np.ones(ROWS, dtype=int))
    return folder


def run_demo(data: Path, report: Path) -> subprocess.CompletedProcess[str]:
    return run("demo", "--data", str(data), "--events", "900", "--json", "--report", str(report))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # one thread per pass: vectors are the same to the last bit
    environment = os.environ | {"MIM_ENCODER__NUM_THREADS": "1"}
    command = [sys.executable, "-m", "streams", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=environment)


def test_a_small_demo_runs_the_whole_loop_and_everything_adds_up(tmp_path: Path) -> None:
    shop = write_set(tmp_path / "shop")
    done = run_demo(shop, tmp_path / "report.html")
    assert done.returncode == 0, done.stderr[-5_000:]
    found = json.loads(done.stdout)  # nothing else may be on standard output
    broken_items = 8  # at least one of each kind of damage
    assert found["items_published"] == ITEMS + broken_items
    assert found["items_encoded"] == found["items_searchable"] == ITEMS
    assert found["items_dead_lettered"] == broken_items
    assert found["behaviours_stored"] == found["behaviours_sent"] - found["behaviours_dead_lettered"]
    assert found["behaviours_dead_lettered"] >= 5
    assert found["behaviours_sent"] == sum(
        found[f"behaviours_{name}"] for name in ("trained", "late", "duplicate", "dead_lettered", "pending")
    )
    assert found["behaviours_late"] == found["behaviours_duplicate"] == 0
    assert found["behaviours_trained"] > 1_000
    assert 0 < found["takes"] <= 900
    assert found["freshness_ms"]["p50"] > 0
    assert found["items_per_second"] > 0
    assert found["prequential"]["ciubm"]["retaken"] is None
    assert len(found["training_rows_sha256"]) == 64
    assert found["sample"]["min_cosine"] > 0.999
    assert found["broken_promises"] == []
    assert set(found["dead_letters_by_reason"]) >= {
        *(f"items {reason}" for reason in ("bad_image", "image_too_large", "no_content", "not_json")),
        *(f"behaviours {reason}" for reason in ("not_json", "unknown_version")),
    }
    page = (tmp_path / "report.html").read_text()
    assert found["report"] == str(tmp_path / "report.html")
    assert "data:image/jpeg;base64," in page
    assert "drawn by seed 0" in page
    figures_without_a_stack_are_those_of_the_demo(shop, found)


def figures_without_a_stack_are_those_of_the_demo(shop: Path, found: dict[str, Any]) -> None:
    cache = {"MIM_ENCODERS__CACHE_FOLDER": str(shop.parent / "cache")}
    sets = [f"--set={name}={value}" for name, value in {**cache, "MIM_TRAIN__VARIANTS": ",".join(VARIANTS)}.items()]
    arguments = ["--protocol", "live", "--events", "900", "--broken", "0.01", "--json", *sets]
    done = run("evaluate", str(shop), *arguments)
    assert done.returncode == 0, done.stderr[-5_000:]
    live = json.loads(done.stdout)
    assert live["training_rows_sha256"] == found["training_rows_sha256"]
    assert {name: live["accounts"][name] for name in ("trained", "dead_lettered", "pending")} == {
        name: found[f"behaviours_{name}"] for name in ("trained", "dead_lettered", "pending")
    }
    assert live["prequential"]["ciubm"]["overall"]["users"] >= 100
    assert live["prequential"] == found["prequential"]  # to the last digit


def test_a_missing_column_ends_the_demo_before_anything_starts(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "shop")
    path = folder / "interactions.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["ts"]), path)
    done = run_demo(folder, tmp_path / "report.html")
    assert done.returncode == 2
    assert "interactions.parquet: column 'ts' is missing" in done.stderr
    assert done.stdout == ""
