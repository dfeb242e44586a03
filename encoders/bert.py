"""BERT's forward pass in plain torch, without the seconds that an import of transformers takes.

That import was most of the restart time of an index worker. Other architectures use transformers.

Source: BERT (arXiv 1810.04805); same layout and names as transformers' `BertModel`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from encoders.arithmetic import ALIKE_ROWS
from encoders.packed_linear import PackedLinear

_PROBE_TOKENS = 8

# B = batch, L = tokens, H = heads, D = hidden width


class Bert:
    """Last hidden states of a BERT encoder in evaluation mode."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        config = json.loads((folder / "config.json").read_text())
        weights = {
            name.removeprefix("bert."): tensor.float().to(device)
            for path in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }
        self.weights = weights
        """Tensors by name; `encoders.tuning` replaces some of them by parameters."""
        self.depth: int = config["num_hidden_layers"]
        self._linear_of = PackedLinear()
        self._heads: int = config["num_attention_heads"]
        self._epsilon: float = config["layer_norm_eps"]
        self.width: int = config["hidden_size"]
        self.longest: int = config["max_position_embeddings"]
        probe = torch.zeros((1, 2), dtype=torch.long, device=device)
        self(probe, torch.ones_like(probe))  # fails here if a tensor is missing
        self.alike_rows = 1 if device.type == "cpu" and self._is_alike_alone() else ALIKE_ROWS
        """Rows of a pass from which on a row does not depend on the others, to the last bit, on a CPU."""

    def _is_alike_alone(self) -> bool:
        """Whether one text has the same states alone as among others."""
        width = min(_PROBE_TOKENS, self.longest)
        words = len(self.weights["embeddings.word_embeddings.weight"])
        ids_BL = (torch.arange(4 * width) % words).reshape(4, width)
        mask_BL = torch.ones_like(ids_BL)
        whole_BLD = self(ids_BL, mask_BL)
        return all(torch.equal(self(ids_BL[:n], mask_BL[:n]), whole_BLD[:n]) for n in (1, 2, 3))

    @staticmethod
    def reads(config: dict[str, Any]) -> bool:
        """Whether a `config.json` describes the architecture computed here."""
        return (
            config.get("model_type") == "bert"
            and config.get("hidden_act") == "gelu"
            and config.get("position_embedding_type", "absolute") == "absolute"
            and not config.get("is_decoder", False)
        )

    def __call__(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L, D) states of token ids; `mask_BL` is 1 where there is a token and 0 where there is padding."""
        return self.layers(self.embed(ids_BL), mask_BL, range(self.depth))

    def embed(self, ids_BL: Tensor) -> Tensor:
        """(B, L, D) input of the first layer."""
        states_BLD = (
            F.embedding(ids_BL, self.weights["embeddings.word_embeddings.weight"])
            + self.weights["embeddings.token_type_embeddings.weight"][0]
            + self.weights["embeddings.position_embeddings.weight"][: ids_BL.shape[1]]
        )
        return self._norm("embeddings.LayerNorm", states_BLD)

    def layers(self, states_BLD: Tensor, mask_BL: Tensor, numbers: range) -> Tensor:
        """(B, L, D) states after these layers."""
        batch, length = mask_BL.shape
        seen_B11L = mask_BL.bool()[:, None, None, :]
        for number in numbers:
            layer = f"encoder.layer.{number}"
            query_BHLd, key_BHLd, value_BHLd = (
                self._linear(f"{layer}.attention.self.{part}", states_BLD)
                .view(batch, length, self._heads, -1)
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            mixed_BHLd = F.scaled_dot_product_attention(query_BHLd, key_BHLd, value_BHLd, attn_mask=seen_B11L)
            mixed_BLD = mixed_BHLd.transpose(1, 2).reshape(batch, length, self.width)
            attended_BLD = self._linear(f"{layer}.attention.output.dense", mixed_BLD)
            states_BLD = self._norm(f"{layer}.attention.output.LayerNorm", attended_BLD + states_BLD)
            inner = F.gelu(self._linear(f"{layer}.intermediate.dense", states_BLD))
            states_BLD = self._norm(
                f"{layer}.output.LayerNorm", self._linear(f"{layer}.output.dense", inner) + states_BLD
            )
        return states_BLD

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights by name. Raises `ValueError` for an unknown name or shape."""
        for name, value in weights.items():
            if name not in self.weights or self.weights[name].shape != value.shape:
                raise ValueError(f"{name} is no weight of this tower")
            self.weights[name] = value.to(self.weights[name])

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        return self._linear_of(name, inputs, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, inputs: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(inputs, (self.width,), weight, bias, self._epsilon)
