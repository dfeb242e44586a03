"""`mimstream bench encode`: the item path from Kafka records to Milvus rows, beside the bare limit of the towers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from schemas.errors import Misconfigured
from streams.bench.machine import cores
from streams.runtime.progress import progress_bar
from streams.settings import Settings

DEFAULT_ITEMS = 1_024
BATCH_SIZES = (16, 64, 128)
FEWEST_BATCHES = 8
"""A cell is measured only where each worker gets this many batches: the first few are its start."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument("--items", type=int, default=DEFAULT_ITEMS, metavar="N", help="items published per measurement")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data-set folder (default: the films that ship with us, drawn cards)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure and print."""
    from streams.bench.encode_content import read_content
    from streams.bench.encode_limit import measure_limit, measure_precisions
    from streams.bench.encode_path import EncodeBench
    from streams.bench.picture_site import PictureSite

    plan = sweep_plan(options.items, cores())
    if not plan:
        raise Misconfigured(f"--items {options.items}: at least {BATCH_SIZES[0] * FEWEST_BATCHES} are needed")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # children and folder go first
    load = os.getloadavg()[0]
    content = read_content(options.data, options.items)
    with (
        tempfile.TemporaryDirectory(prefix="mimstream-bench-") as folder,
        progress_bar("the towers alone", len(plan) + 4) as bar,
    ):
        batches = sorted({cell.batch for cell in plan})
        limits = measure_limit(settings.encoder, content, batches, cores())
        bar.advance(what="the towers at reduced precision")
        precisions = measure_precisions(settings.encoder, content)
        bar.advance(what="starting Kafka, Valkey and Milvus Lite")
        with EncodeBench(settings, content, Path(folder), options.config) as bench:
            cells = []
            for cell in plan:
                bar.advance(what=f"the whole path: {cell.workers} worker(s), batches of {cell.batch}")
                cells.append(bench.measure(cell.workers, cell.batch))
            site = PictureSite()
            best = max(cells, key=lambda cell: cell.items_per_second)
            bar.advance(what=f"pictures by URL, each {site.latency_seconds * 1000:.0f} ms away")
            by_url = bench.measure(best.workers, best.batch, site)
        # the machine may have become faster or slower meanwhile: half of the limit's figure is from after the path
        limits += measure_limit(settings.encoder, content, batches, cores())
    result = summary(cells, limits, precisions, device=settings.encoder.device)
    result["pictures_by_url"] = asdict(site) | {
        "workers": by_url.workers,
        "batch": by_url.batch,
        "items_per_second": round(by_url.items_per_second, 2),
        "ratio_to_pictures_in_records": round(by_url.items_per_second / best.items_per_second, 4),
        "first_try_share": round(by_url.first_try_share, 4),
    }
    result["items"], result["data"], result["cores"] = len(content.records), content.name, cores()
    result["load_average_before"] = round(load, 2)
    print(json.dumps(result)) if options.json else _print(result)
    return 0


@dataclass(frozen=True)
class Cell:
    """One setting of the sweep."""

    workers: int
    batch: int


def sweep_plan(items: int, cores: int) -> list[Cell]:
    """What `items` are enough for: batch sizes with one worker, then one size with more of them."""
    cells = [Cell(1, batch) for batch in BATCH_SIZES if items >= FEWEST_BATCHES * batch]
    for workers in (2, 4):
        fitting = [batch for batch in BATCH_SIZES[:2] if items >= FEWEST_BATCHES * batch * workers]
        if workers <= cores and fitting:
            cells.append(Cell(workers, fitting[-1]))
    return cells


def summary(cells: list[Any], limits: list[Any], precisions: list[Any], *, device: str) -> dict[str, Any]:
    """The result: the best cell of the sweep against the limit at its best batch size (mean of before and after)."""
    best = max(cells, key=lambda cell: cell.items_per_second)
    rates: dict[tuple[int, int], list[float]] = {}
    for limit in limits:
        rates.setdefault((limit.batch, limit.side_by_side), []).append(limit.items_per_second)
    means = {setting: sum(found) / len(found) for setting, found in rates.items()}
    setting = max(means, key=lambda one: means[one])
    return {
        "items_per_second": round(best.items_per_second, 2),
        "limit_items_per_second": round(means[setting], 2),
        "ratio_to_limit": round(best.items_per_second / means[setting], 4),
        "batch": best.batch,
        "workers": best.workers,
        "limit_batch": setting[0],
        "limit_side_by_side": setting[1],
        "peak_memory_bytes": best.peak_memory_bytes,
        "device": device,
        "sweep": [asdict(cell) for cell in cells],
        "limits": [asdict(limit) for limit in limits],
        "precisions": [asdict(precision) for precision in precisions],
    }


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="Kafka records to Milvus rows")
    for name in ("workers", "batch", "items/s", "peak memory of a worker"):
        table.add_column(name, justify="right")
    for cell in result["sweep"]:
        table.add_row(
            str(cell["workers"]),
            str(cell["batch"]),
            f"{cell['items_per_second']:.1f}",
            f"{cell['peak_memory_bytes'] / 2**20:.0f} MiB",
        )
    console.print(table)
    table = Table(title="Precision of the towers, against fp32")
    for name in ("tower", "precision", "items/s", "lowest cosine", "mean cosine"):
        table.add_column(name, justify="right")
    for one in result["precisions"]:
        table.add_row(
            one["tower"],
            one["precision"],
            f"{one['items_per_second']:.0f}",
            f"{one['lowest_cosine']:.5f}",
            f"{one['mean_cosine']:.5f}",
        )
    console.print(table)
    url = result["pictures_by_url"]
    console.print(
        f"pictures by URL, {url['latency_seconds'] * 1000:.0f} ms away, {url['error_share']:.0%} errors: "
        f"{url['items_per_second']:.1f} items/s, {url['first_try_share']:.1%} at the first try"
    )
    console.print(
        f"{result['items_per_second']:.1f} items/s, {result['ratio_to_limit']:.0%} of the "
        f"{result['limit_items_per_second']:.1f} that the towers reach alone on {result['cores']} cores"
        f" ({result['device']})"
    )
