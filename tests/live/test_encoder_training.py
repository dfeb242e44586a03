"""Encoders taught from a real broker: topics and offsets in, a bundle out that says what it has seen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.base import ItemContent
from encoders.config import EncoderConfig
from encoders.loading import load_encoder
from encoders.trained import read_trained
from streams.encoder_training.topic_input import read_topics
from streams.settings import Settings

COLOURS = ["red", "blue", "green", "black"]
THINGS = ["dress", "boots", "lamp", "chair", "kettle", "novel", "tent", "guitar", "scarf", "watch"]


def write_set(folder: Path, rows: int = 400) -> Path:
    """Users stay with one colour."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    items = len(COLOURS) * len(THINGS)
    user = rng.integers(0, 40, rows)
    item = rng.integers(0, len(THINGS), rows) * len(COLOURS) + user % len(COLOURS)
    table = {
        "item_id": np.arange(items),
        "title": [f"{COLOURS[i % len(COLOURS)]} {THINGS[i // len(COLOURS)]}" for i in range(items)],
        "year": [2000 + i % len(COLOURS) for i in range(items)],
        "price": [float(1 + i) for i in range(items)],
        "publish_ts": np.full(items, 1_700_000_000),
    }
    pq.write_table(pa.table(table), folder / "items.parquet")
    ts = 1_700_000_100 + np.sort(rng.integers(0, 90_000, rows))
    pq.write_table(
        pa.table({"user_id": user, "item_id": item, "ts": ts, "label": [1] * rows}), folder / "interactions.parquet"
    )
    return folder


async def test_an_encoder_learns_from_the_topics_and_says_which_offsets_taught_it(
    settings: Settings, process: Callable[..., Any], tmp_path: Path
) -> None:
    replay = process("replay", str(write_set(tmp_path / "set")), "--seed", "1", "--broken", "0.01")
    assert replay.wait() == 0, replay.output()
    own = {"MIM_ENCODERS__CACHE_FOLDER": str(tmp_path / "cache"), "MIM_ENCODERS__FOLDER": str(tmp_path / "encoders")}

    first = process("pretrain", "--out", str(tmp_path / "one"), "--json", env=own, cold=True)
    assert await asyncio.to_thread(first.wait, 120.0) == 0, first.output()
    stage_one = json.loads(first.output().splitlines()[-1])

    # warm start from the bundle that serves now; items are in the cache already
    own["MIM_ENCODER__BUNDLE"] = str(tmp_path / "one")
    second = process("csft", "--epochs", "2", "--json", env=own, cold=True)
    assert await asyncio.to_thread(second.wait, 120.0) == 0, second.output()
    report = json.loads(second.output().splitlines()[-1])

    assert report["parent"] == stage_one["encoder_version"] != report["encoder_version"]
    assert report["features_computed"] == 0
    assert report["broken"] > 0 and report["collapse"] is None
    manifest, training, _ = read_trained(Path(report["bundle"]))
    assert Path(report["bundle"]).name == manifest.version == report["encoder_version"]
    read = await read_topics(settings.kafka, settings.topics, {}, {})
    assert training.offsets == read.offsets and training.cluster_id == read.cluster_id
    # broken records were passed over, not lost: readable and broken ones add up to what the topics held
    held = sum(sum(partitions.values()) for partitions in training.offsets.values())
    assert held == report["behaviours"] + report["broken"] + len(read.items)
    assert training.pairs > 100 and training.last_event_at is not None

    encoder = await asyncio.to_thread(load_encoder, EncoderConfig(bundle=report["bundle"], width=64))
    assert encoder.version == f"{manifest.version}-w64"
    vectors = encoder.encode([encoder.prepare(ItemContent(title="red dress", year=2000, price=3.0))])
    assert vectors.shape == (1, 64)
