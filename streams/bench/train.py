"""`mimstream bench train`: samples per second of click models, end to end from Parquet on disk, beside FuxiCTR's DIN.

All read the same files: one row per impression, one history per user, one row per item. Measured is one epoch after the
models were built and the files opened once: reading, batching, forward, backward, update. FuxiCTR (2.3, model_zoo) runs
its own DIN for long histories with its own loader; widths, history length, batch size, optimiser family and threads are
the same. CiUBM is the model that is served, the fit of its trees included, with as many numbers beside each row as it
has features of the moment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from schemas.errors import Misconfigured
from streams.runtime.extras import require_package
from streams.settings import Settings
from trainer.networks.ciubm import DENSE_FEATURES, CiUBM
from trainer.networks.config import CiUBMConfig
from trainer.offline.data import CtrData, Histories, ImpressionColumns, ItemColumns
from trainer.offline.neural.ciubm import add_trees
from trainer.offline.neural.columns import ColumnBatches
from trainer.offline.neural.fitting import FitSettings, fit
from trainer.samples.id_hashes import hash_columns

WIDTH, ATTENTION_HIDDEN, HIDDEN, VECTOR_WIDTH = 16, 32, (96, 48), 128
USERS, ITEMS = 5_000, 20_000
ROUNDS = 3
DIN: dict[str, Any] = {"cross_layers": 0, "categories": 0, "numeric_width": 0, "trees": {"count": 0}}
"""What a DIN has not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument("--rows", type=int, default=50_000, metavar="N", help="impressions per epoch")
    parser.add_argument("--history", type=int, default=100, metavar="N", help="longest history")
    parser.add_argument("--batch", type=int, default=512, metavar="N", help="impressions per step")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure and print."""
    if min(options.rows, options.history, options.batch) < 1:
        raise Misconfigured("--rows, --history and --batch are at least 1")
    require_package("fuxictr", "the comparison with FuxiCTR")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mimstream-bench-") as name:
        folder = Path(name)
        write_log(folder, rows=options.rows, history=options.history, rng=np.random.default_rng(0))
        contenders: dict[str, Callable[[], float]] = {
            "din": lambda: _ours(folder, options, CiUBMConfig(**_sizes(), **DIN).without_content(), features=False),
            "ciubm": lambda: _ours(folder, options, CiUBMConfig(**_sizes())),
            "fuxictr_din": lambda: fuxictr_seconds(folder, options.history, options.batch),
        }
        # in turns, so that a machine that becomes faster or slower meanwhile does so for all; the best of each counts
        seconds = {name: min(times) for name, times in _in_turns(contenders).items()}
    result = {f"{name}_samples_per_second": round(options.rows / each, 1) for name, each in seconds.items()}
    result |= {
        "ratio_to_fuxictr": round(seconds["fuxictr_din"] / seconds["din"], 3),
        "ratio_to_fuxictr_ciubm": round(seconds["fuxictr_din"] / seconds["ciubm"], 3),
        "rows": options.rows,
        "history": options.history,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
    }
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        table = Table("model", "samples/s", title="training, end to end from Parquet")
        for name in seconds:
            table.add_row(name, f"{result[f'{name}_samples_per_second']:,.0f}")
        Console().print(table, f"DIN is {result['ratio_to_fuxictr']:.2f} times as fast as FuxiCTR's.")
    return 0


def _in_turns(contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, seconds in contenders.items():
            times[name].append(seconds())
    return times


def write_log(folder: Path, *, rows: int, history: int, rng: np.random.Generator) -> None:
    """Impressions of users with histories of every length up to `history`, popular items more often, as Parquet."""
    popularity = 1 / np.arange(1, ITEMS + 1) ** 0.8
    popularity /= popularity.sum()
    taken = rng.choice(ITEMS, size=USERS * history, p=popularity) + 1
    sequences = pa.FixedSizeListArray.from_arrays(pa.array(taken), history).cast(pa.list_(pa.int64()))
    pq.write_table(pa.table({"full_item_seq": sequences}), folder / "users.parquet")
    numbers = np.arange(ITEMS + 1)
    pq.write_table(pa.table({"item_index": numbers, "item_id": numbers}), folder / "items.parquet")
    columns = {
        "label": (rng.random(rows) < 0.2).astype(np.int64),
        "user_index": rng.integers(USERS, size=rows),
        "item_index": rng.choice(ITEMS, size=rows, p=popularity) + 1,
        "seq_len": rng.integers(1, history + 1, size=rows),
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    dense = rng.normal(size=rows * DENSE_FEATURES).astype(np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(dense), DENSE_FEATURES)
    pq.write_table(pa.table({"features": flat}), folder / "features.parquet")
    vectors = rng.normal(size=(ITEMS + 1, VECTOR_WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), VECTOR_WIDTH)
    pq.write_table(pa.table({"vector": flat}), folder / "vectors.parquet")


def read_log(folder: Path, *, content: bool = True, features: bool = True) -> CtrData:
    """The same files as columns; histories stay the flat array that Parquet holds. Without `content` no vectors."""
    rows = {name: column.to_numpy() for name, column in _columns(folder / "rows.parquet").items()}
    sequences = pq.read_table(folder / "users.parquet")["full_item_seq"].combine_chunks()
    offsets = sequences.offsets.to_numpy()
    items = pq.read_table(folder / "items.parquet")["item_id"].cast(pa.string()).to_pylist()
    hashes_I2 = hash_columns(items)
    hashes_I2[0] = 0
    vectors_1IV = np.zeros((1, len(items), 0), np.float32)
    if content:
        vectors = pq.read_table(folder / "vectors.parquet")["vector"].combine_chunks().flatten().to_numpy()
        vectors_1IV = vectors.reshape(1, len(items), -1)
    has_1I = np.full((1, len(items)), content)
    has_1I[:, 0] = False
    dense_NF = np.zeros((len(rows["label"]), 0), np.float32)
    if features:
        read = pq.read_table(folder / "features.parquet")["features"].combine_chunks().flatten().to_numpy()
        dense_NF = read.reshape(len(rows["label"]), -1)
    count, start = len(rows["label"]), offsets[rows["user_index"]].astype(np.int64)
    nothing = np.zeros(count, np.int64)
    return CtrData(
        ItemColumns(
            item_ids=items,
            vectors_EIV=vectors_1IV,
            has_vector_EI=has_1I,
            hashes_I2=hashes_I2,
            category_I=np.zeros(len(items), np.int64),
            attributes_IA=np.zeros((len(items), 0), np.float32),
            attribute_names=(),
            titles=[""] * len(items),
        ),
        Histories(sequences.values.to_numpy().astype(np.int32), np.zeros(len(sequences.values), np.int64)),
        ImpressionColumns(
            user_N=rows["user_index"],
            item_N=rows["item_index"],
            second_N=np.arange(count),
            label_N=rows["label"].astype(np.int8),
            retaken_N=np.zeros(count, bool),
            history_start_N=start,
            history_stop_N=start + rows["seq_len"],
            encoder_N=nothing,
            dense_NF=dense_NF,
            dense_names=tuple(f"feature {number}" for number in range(dense_NF.shape[1])),
        ),
    )


def _columns(path: Path) -> dict[str, Any]:
    table = pq.read_table(path)
    return {name: table[name] for name in table.column_names}


def _sizes() -> dict[str, Any]:
    return {"id_width": WIDTH, "attention_hidden": ATTENTION_HIDDEN, "hidden": HIDDEN, "id_admit_after": 1}


def _ours(folder: Path, options: argparse.Namespace, config: CiUBMConfig, *, features: bool = True) -> float:
    network = CiUBM(config, vector_width=VECTOR_WIDTH, dense_width=DENSE_FEATURES if features else 0, seed=0)
    started = time.perf_counter()
    data = read_log(folder, content=config.uses_content, features=features)
    columns = ColumnBatches(data, history_length=options.history)
    settings = FitSettings(epochs=1, batch_rows=options.batch, learning_rate=1e-3, group_weight=0.0)
    fit(network, columns, None, settings, seed=0)
    # what a stream of so many rows fits: trees of the first ones, and the next only after twice as many
    first = data.select(np.arange(min(options.rows, config.trees.first_rows)))
    add_trees(network, ColumnBatches(first, history_length=options.history), seed=0)
    return time.perf_counter() - started


def fuxictr_seconds(folder: Path, history: int, batch: int) -> float:
    """One epoch of FuxiCTR's DIN over the same files. Raises `Misconfigured` if it is not installed."""
    try:
        from fuxictr.features import FeatureMap
        from model_zoo.LongCTR.DIN import DIN
        from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader
    except ImportError as error:
        raise Misconfigured(
            f"the comparison needs FuxiCTR: pip install 'fuxictr>=2.3.10,<2.4' ({error.name} is missing)"
        ) from None
    features = FeatureMap("bench", str(folder))
    features.labels = ["label"]
    meta = {"type": "meta", "source": ""}
    features.features = OrderedDict(
        user_index=meta,
        item_index=meta,
        seq_len=meta,
        item_id={"type": "categorical", "source": "item", "vocab_size": ITEMS + 1, "padding_idx": 0},
    )
    features.default_emb_dim = WIDTH
    features.num_fields = 1
    model = DIN(
        features,
        embedding_dim=WIDTH,
        attention_hidden_units=[ATTENTION_HIDDEN],
        attention_hidden_activations="ReLU",
        dnn_hidden_units=list(HIDDEN),
        learning_rate=1e-3,
        optimizer="adam",
        loss="binary_crossentropy",
        verbose=0,
        model_root=str(folder),
        metrics=["AUC"],
    )
    started = time.perf_counter()
    loader = LongCTRDataLoader(
        features,
        str(folder / "rows.parquet"),
        str(folder / "users.parquet"),
        str(folder / "items.parquet"),
        batch_size=batch,
        shuffle=True,
        num_workers=0,
        max_len=history,
    )
    model._max_gradient_norm = 10.0  # what its `fit` sets before the epoch; `fit` itself needs a validation set
    model._eval_steps, model._total_steps, model._stop_training = sys.maxsize, 0, False
    model.train_epoch(loader)
    return time.perf_counter() - started
