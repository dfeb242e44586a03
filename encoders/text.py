"""The text tower: token ids to features, with any transformers encoder in a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from encoders.arithmetic import ALIKE_ROWS, computing, sent
from encoders.bert import Bert
from encoders.config import Precision
from encoders.digests import files_sha256
from schemas.errors import Misconfigured

_States = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_TOKENS_PER_BATCH = 4096
"""Bound on padded tokens in one forward pass, which bounds memory for any batch."""

_POSITIONS_AFTER_PADDING = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"})
"""Kinds of models that number positions from behind the padding token's: of 514 positions 512 are left."""

_WIDTHS = 8
"""On a CPU texts are padded to multiples of this: enough texts share a pass, with little padding."""


class TextTower:
    """Mean over the last hidden states of the real tokens; `width` features per text.

    Texts are grouped by length, so that a short title is not padded to a long description. On a CPU the padded width
    depends on a text's own length alone, and its features do not depend on the other texts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_tokens: int,
        device: str = "cpu",
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        self.folder = folder
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self._precision = precision
        try:
            config = json.loads((folder / "config.json").read_text())
            self._tokenizer = _load_tokenizer(folder)
            self.model = _load_model(folder, config, self.device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise Misconfigured(f"text model in {folder} cannot be loaded: {type(error).__name__}: {error}") from error
        self._states: _States = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.width = self.model.width
        if max_tokens > self.model.longest:
            raise Misconfigured(
                f"text model in {folder} reads {self.model.longest} tokens, the bundle asks for {max_tokens}"
            )
        self._pad = int(config.get("pad_token_id") or 0)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._specials = {number for number, token in added.items() if token.special and token.content != unknown}

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        """Token ids with specials, at most `max_tokens`; None if the text has no token. Thread-safe."""
        ids = self._tokenizer.encode(text).ids  # its settings do not change after construction, so threads may share it
        return tuple(ids) if any(token not in self._specials for token in ids) else None

    def vocabulary(self) -> list[str]:
        """Whole words of the tokenizer's vocabulary, in alphabetical order."""
        words = {token.removeprefix("▁").removeprefix("Ġ") for token in self._tokenizer.get_vocab()}
        return sorted(word for word in words if word.isascii() and word.isalpha() and len(word) > 2)

    @torch.inference_mode()
    def features(self, texts: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """(n, width) features in the order given."""
        out = np.empty((len(texts), self.width), dtype=np.float32)
        order: list[int] = []
        parts: list[torch.Tensor] = []
        alike = self.device.type == "cpu"
        step = _WIDTHS if alike else 1
        widths = [min(-(-len(text) // step) * step, self.model.longest) for text in texts]
        for rows in by_length(widths, alike=alike):
            width = widths[rows[-1]]
            more = max(0, -(-self.model.alike_rows // width) - len(rows)) if alike else 0
            ids, mask = self.padded([texts[row] for row in rows + rows[:1] * more], width)
            with computing(self.device, self._precision):
                states = self._states(ids, mask)
            parts.append(mean_pool(states.float(), mask)[: len(rows)])
            order += rows
        if parts:
            out[order] = torch.cat(parts).cpu().numpy()  # one wait for the device, at the end
        return out

    def padded(self, texts: Sequence[tuple[int, ...]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, width) token ids and mask on the tower's device; `width` is by default that of the longest text."""
        width = width or max(len(text) for text in texts)
        ids = torch.full((len(texts), width), self._pad, dtype=torch.long)
        mask = torch.zeros((len(texts), width), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        return sent(ids, self.device), sent(mask, self.device)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load trained weights by name. Raises `ValueError` for an unknown name or shape."""
        self.model.load(weights)


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n, width) mean over the real tokens."""
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1)


def _load_tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the binding raises nothing more precise
            raise ValueError(f"tokenizer.json: {error}") from error
    from transformers import AutoTokenizer

    backend = getattr(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError("it has no fast tokenizer (tokenizer.json)")
    return backend


class TransformersText:
    """Last hidden states of any transformers text encoder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModel  # takes seconds to import, and only other architectures need it
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a service's log holds lines
        # safetensors only: a pickle can run code on loading
        whole: Any = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        self.network: Any = getattr(whole, "text_model", whole).eval().requires_grad_(False).to(device)
        self.width: int = self.network.config.hidden_size
        self.longest: int = _longest(self.network.config.to_dict())
        self.alike_rows = ALIKE_ROWS
        """Rows of a pass from which on a row does not depend on the others, to the last bit, on a CPU."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, L, width) states of token ids."""
        hidden: torch.Tensor = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load weights by name. Raises `ValueError` for an unknown name or shape."""
        load_into(self.network, weights)


def _load_model(folder: Path, config: dict[str, Any], device: torch.device) -> Bert | TransformersText:
    if Bert.reads(config):
        with torch.inference_mode():
            return Bert(folder, device)
    return TransformersText(folder, device)


def load_into(network: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace some of a module's weights. Raises `ValueError` for an unknown name or shape."""
    own = network.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{name} is no weight of this tower")
    network.load_state_dict(dict(weights), strict=False)


def by_length(lengths: Sequence[int], *, alike: bool = False) -> Iterator[list[int]]:
    """Row numbers in groups of similar length, one pass of at most 4,096 padded tokens each.

    `alike`: all rows of a group have the same length.
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(group) + 1) * lengths[row] > _TOKENS_PER_BATCH
        if group and (full or (alike and lengths[group[0]] != lengths[row])):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def longest_text(folder: Path) -> int:
    """Most tokens of a text, specials included, that the model in a folder reads. Raises `Misconfigured`."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return _longest(config.get("text_config") or config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise Misconfigured(f"text model in {folder} has no config.json that can be read: {error}") from error


def _longest(config: Mapping[str, Any]) -> int:
    positions = int(config.get("max_position_embeddings") or 1 << 20)
    if config.get("model_type") in _POSITIONS_AFTER_PADDING:
        positions -= int(config.get("pad_token_id") or 0) + 1
    return positions


def text_model_sha256(folder: Path) -> str:
    """Digest of the files that determine a text tower's features: weights, architecture, tokenizer."""
    return files_sha256(folder, model_files(folder, "tokenizer.json", "tokenizer_config.json", "vocab.txt"))


def model_files(folder: Path, *extra: str) -> list[str]:
    """Weight and configuration files of a transformers folder. Raises `Misconfigured` without safetensors."""
    names = [path.name for path in folder.glob("*.safetensors")]
    if not names or not (folder / "config.json").is_file():
        raise Misconfigured(
            f"{folder} is no transformers model folder with safetensors weights (needs config.json and *.safetensors)"
        )
    return names + [name for name in ("config.json", *extra) if (folder / name).is_file()]
