"""Transformers models of one small layer with random weights, saved as any local model is.

The library takes seconds to import: only a test that makes such a model pays for it, and no collection of tests does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.factories.encoders import write_tokenizer


def write_distilbert(folder: Path, **shape: int) -> None:
    """A DistilBERT with its tokenizer."""
    from transformers import DistilBertConfig, DistilBertModel

    words = write_tokenizer(folder)
    torch.manual_seed(0)
    config: dict[str, Any] = {"dim": 104, "n_layers": 1, "n_heads": 2, "hidden_dim": 32} | shape
    DistilBertModel(DistilBertConfig(vocab_size=words, **config)).save_pretrained(folder)


def write_bert(folder: Path, **shape: Any) -> None:
    """A BERT with its tokenizer."""
    from transformers import BertConfig, BertModel

    words = write_tokenizer(folder)
    torch.manual_seed(0)
    config: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64} | shape
    BertModel(BertConfig(vocab_size=words, **config)).save_pretrained(folder)


def write_vit(folder: Path, *, patch_size: int) -> None:
    """A ViT for pictures of 32 pixels."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    layers = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=patch_size, **layers)).save_pretrained(folder)
    write_processor(folder)


def write_processor(folder: Path) -> None:
    """The settings of pictures of 32 pixels."""
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
