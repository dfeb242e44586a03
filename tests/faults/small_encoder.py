"""An encoder for fault rounds."""

from __future__ import annotations

from pathlib import Path

import torch

from encoders.bundle import ImageSpec, TextSpec, WeightsPlace
from encoders.config import EncoderConfig
from encoders.image import vision_model_sha256
from encoders.loading import make_bundle
from encoders.text import text_model_sha256
from tests.factories.encoders import write_tokenizer


def small_encoder(folder: Path) -> Path:
    """A bundle with towers of one small layer each: the real code, a hundredth of the work."""
    from transformers import DistilBertConfig, DistilBertModel, ViTConfig, ViTImageProcessor, ViTModel

    if (folder / "bundle" / "bundle.json").exists():
        return folder / "bundle"
    text, image = folder / "text", folder / "image"
    text.mkdir(parents=True, exist_ok=True)
    words = write_tokenizer(text)
    torch.manual_seed(0)
    language = DistilBertConfig(vocab_size=words, dim=48, n_layers=1, n_heads=2, hidden_dim=32)
    vision = ViTConfig(
        hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    DistilBertModel(language).save_pretrained(text)
    ViTModel(vision).save_pretrained(image)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(image)
    text_weights = WeightsPlace(path=str(text), sha256=text_model_sha256(text))
    image_weights = WeightsPlace(path=str(image), sha256=vision_model_sha256(image))
    make_bundle(
        folder / "bundle",
        text=TextSpec(weights=text_weights, max_tokens=32),
        image=ImageSpec(kind="transformers", weights=image_weights, size=32),
        config=EncoderConfig(),
        text_dim=24,
        image_dim=8,
    )
    return folder / "bundle"
