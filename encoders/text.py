"""The text tower: token ids to features, with any transformers encoder that lies in a local folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.digests import files_sha256
from schemas.errors import Misconfigured

_TOKENS_PER_BATCH = 4096
"""Bound on padded tokens in one forward pass; keeps memory flat whatever the batch."""


class TextTower:
    """Mean over the last hidden states of the real tokens; `width` features per text.

    Texts are grouped by length, so that a short title does not pay for a long description beside it.
    """

    def __init__(self, folder: Path, *, max_tokens: int, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer  # slow to import, and only real towers need it

        self.max_tokens = max_tokens
        self._device = torch.device(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            # safetensors only: a pickle would run code on loading
            model = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise Misconfigured(f"text model in {folder} cannot be loaded: {error}") from error
        self._tokenizer: Any = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()
        if self._backend is not None:
            self._backend.no_padding()
            self._backend.enable_truncation(max_tokens)
        self._specials = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._pad = int(tokenizer.pad_token_id or 0)
        self._model: Any = getattr(model, "text_model", model).eval().requires_grad_(False).to(self._device)
        self.width: int = self._model.config.hidden_size

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        """Token ids with specials, at most `max_tokens`; None if the text holds no token at all. Thread-safe."""
        if self._backend is not None:
            ids = self._backend.encode(text).ids  # the settings were fixed above, so threads may share it
        else:
            with self._lock:  # a Python tokenizer promises nothing about threads
                ids = self._tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return tuple(ids) if any(token not in self._specials for token in ids) else None

    @torch.inference_mode()
    def features(self, texts: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """(n, width) features in the order given."""
        out = np.empty((len(texts), self.width), dtype=np.float32)
        for rows in _by_length([len(text) for text in texts]):
            longest = max(len(texts[row]) for row in rows)
            ids = torch.full((len(rows), longest), self._pad, dtype=torch.long)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for at, row in enumerate(rows):
                ids[at, : len(texts[row])] = torch.tensor(texts[row])
                mask[at, : len(texts[row])] = 1
            hidden = self._model(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
            ).last_hidden_state.float()
            weights = mask.to(self._device).unsqueeze(-1).float()
            out[rows] = ((hidden * weights).sum(1) / weights.sum(1)).cpu().numpy()
        return out


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers grouped so that neighbours in length share a pass of at most `_TOKENS_PER_BATCH` padded tokens."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[row] > _TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def text_model_sha256(folder: Path) -> str:
    """Digest of what decides a text tower's features: weights, architecture, tokenizer."""
    return files_sha256(folder, model_files(folder, "tokenizer.json", "tokenizer_config.json", "vocab.txt"))


def model_files(folder: Path, *extra: str) -> list[str]:
    """Names of the weight and configuration files of a transformers folder; `Misconfigured` without safetensors."""
    names = [path.name for path in folder.glob("*.safetensors")]
    if not names or not (folder / "config.json").is_file():
        raise Misconfigured(
            f"{folder} is no transformers model folder with safetensors weights (needs config.json and *.safetensors)"
        )
    return names + [name for name in ("config.json", *extra) if (folder / name).is_file()]
