"""The bare limit: decoding and towers alone, on the bytes that the whole path is measured with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.arithmetic import computing
from encoders.config import EncoderConfig, Precision
from encoders.loading import load_encoder
from encoders.multimodal import MultiModalEncoder
from encoders.trained import TrainedEncoder
from streams.bench.encode_content import BenchItems

_LIMIT_ITEMS, _PRECISION_ITEMS, _WARM_UP_ITEMS = 256, 64, 32


@dataclass(frozen=True)
class Limit:
    """What decoding and towers reach with one batch size."""

    batch: int
    side_by_side: int
    """Passes that run at a time, each with its share of the cores."""
    items_per_second: float
    decode_items_per_second: float
    forward_items_per_second: float


@dataclass(frozen=True)
class TowerPrecision:
    """A tower in one precision, on pictures or texts of the benchmark."""

    tower: str
    precision: Precision
    items_per_second: float
    lowest_cosine: float
    """To the features in fp32."""
    mean_cosine: float


def measure_limit(config: EncoderConfig, content: BenchItems, batches: Sequence[int], cores: int) -> list[Limit]:
    """Items per second at each batch size on all cores, no stores and no topics.

    On a CPU decoding and forward pass take turns on the same cores, as one pass at a time on all cores and as one pass
    per core. A GPU computes while the CPU decodes, so there the slower of the two is the limit.
    """
    encoder = load_encoder(config)
    on_cpu = config.device == "cpu"
    items = content.items[: min(_LIMIT_ITEMS, len(content.items) // 4)]  # small runs stay small
    found = []
    threads = torch.get_num_threads()
    for side_by_side in (1, cores) if on_cpu and cores > 1 else (1,):
        torch.set_num_threads(max(1, cores // side_by_side))
        with ThreadPoolExecutor(side_by_side) as passes, ThreadPoolExecutor(cores) as decoders:
            list(passes.map(encoder.encode, [[encoder.prepare(item)] for item in items[:_WARM_UP_ITEMS]]))
            for batch in batches:
                decoding, prepared = _timed(lambda: list(decoders.map(encoder.prepare, items)))
                parts = [prepared[start : start + batch] for start in range(0, len(prepared), batch)]
                forward, _ = _timed(lambda: list(passes.map(encoder.encode, parts)))  # noqa: B023
                seconds = decoding + forward if on_cpu else max(decoding, forward)
                count = len(items)
                found.append(Limit(batch, side_by_side, count / seconds, count / decoding, count / forward))
    torch.set_num_threads(threads)
    return found


def measure_precisions(config: EncoderConfig, content: BenchItems) -> list[TowerPrecision]:
    """Speed and cosine of each tower in each precision, whether or not the tower would take it."""
    encoder = load_encoder(config.model_copy(update={"precision": "fp32"}))
    towers = encoder.towers if isinstance(encoder, TrainedEncoder) else encoder
    if not isinstance(towers, MultiModalEncoder):
        return []
    prepared = [encoder.prepare(item) for item in content.items[:_PRECISION_ITEMS]]
    texts = [one.tokens for one in prepared if one.tokens is not None]
    pictures = [one.pixels for one in prepared if one.pixels is not None]
    del pictures[max(1, len(content.items) // 16) :]  # a CPU that only emulates fp16 takes a second for each
    return [
        *_compared("text", towers.text.features, texts, config.device),
        *_compared("image", towers.image.features, pictures, config.device),
    ]


def _compared(
    tower: str, features: Callable[[list[Any]], NDArray[np.float32]], rows: list[Any], device: str
) -> list[TowerPrecision]:
    reference = features(rows)
    found = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    for precision in precisions:
        with computing(torch.device(device), precision):
            features(rows[: max(1, len(rows) // 8)])  # warm-up
            seconds, computed = _timed(lambda: features(rows))
        lengths = np.linalg.norm(computed, axis=1) * np.linalg.norm(reference, axis=1)
        cosines = (computed * reference).sum(1) / lengths
        found.append(TowerPrecision(tower, precision, len(rows) / seconds, float(cosines.min()), float(cosines.mean())))
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result
