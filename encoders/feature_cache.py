"""Tower features on disk, by content: each picture and text passes through the towers once.

```text
<cache folder>/features/<digest of the towers>/<random>.safetensors    immutable; rows of text and image features
```

A row's key is a hash over the towers' input. Shards are written under a temporary name and renamed, so a reader sees a
whole shard or none, several processes may share the folder, and a killed run loses at most one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from encoders.base import ItemContent, Prepared
from encoders.features import ItemFeatures, attribute_columns, word_hashes
from encoders.multimodal import MultiModalEncoder
from schemas.errors import EncodingFailed, Reason

_ROWS_PER_SHARD = 1_024
_ROWS_PER_PASS = 64

Warn = Callable[..., object]
"""Receives the name of an event and its fields as keywords, like a structlog `warning`."""


def _ignore(event: str, **fields: str) -> None:
    pass


class FeatureCache:
    """Features of items from memory, disk or the towers, in that order of preference.

    `warn` receives shards that cannot be read (their rows are computed again) and pictures that cannot be decoded.
    """

    def __init__(self, folder: Path, towers: MultiModalEncoder, digest: str, *, warn: Warn = _ignore) -> None:
        self.folder = folder / "features" / digest
        """The folder of the shards."""
        self._towers = towers
        self._warn = warn
        self._rows: dict[str, tuple[NDArray[np.float32], NDArray[np.float32], bool, bool]] = {}
        self._read = False
        self.computed = 0
        """Rows computed by the towers."""

    def features(
        self, contents: Sequence[ItemContent], *, on_progress: Callable[[int], None] = lambda done: None
    ) -> ItemFeatures:
        """Features of these items. A picture that cannot be decoded counts as missing; so does text without words."""
        if not self._read:
            self._load()
        keys = [content_key(content) for content in contents]
        missing = {key: place for place, key in enumerate(keys) if key not in self._rows}
        on_progress(len(contents) - len(missing))
        places = iter(missing.values())
        fresh: list[str] = []
        parts = prepared(
            self._towers, [contents[place] for place in missing.values()], on_progress=on_progress, warn=self._warn
        )
        for part in parts:
            chunk = [keys[place] for place in islice(places, len(part))]
            self._compute(chunk, part)
            fresh += chunk
            if len(fresh) >= _ROWS_PER_SHARD:
                self._write(fresh)
                fresh = []
        if fresh:
            self._write(fresh)
        rows = [self._rows[key] for key in keys]
        text_width, image_width = self._towers.tower_widths
        return ItemFeatures(
            text_NT=np.stack([row[0] for row in rows]) if rows else np.zeros((0, text_width), np.float32),
            image_NI=np.stack([row[1] for row in rows]) if rows else np.zeros((0, image_width), np.float32),
            has_text_N=np.array([row[2] for row in rows], bool),
            has_image_N=np.array([row[3] for row in rows], bool),
            **attribute_columns(
                [one.category for one in contents],
                [one.year for one in contents],
                [one.price for one in contents],
                [word_hashes(one.attributes) for one in contents],
            ),
        )

    def _compute(self, keys: list[str], prepared: list[Prepared]) -> None:
        text, image = self._towers.tower_features(prepared)
        for key, one, text_row, image_row in zip(keys, prepared, text, image, strict=True):
            self._rows[key] = (text_row, image_row, one.has_title, one.has_image)
        self.computed += len(keys)

    def _load(self) -> None:
        self._read = True
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as shard:
                    keys = json.loads((shard.metadata() or {})["keys"])
                    text, image, has = (shard.get_tensor(name) for name in ("text", "image", "has"))
                    for key, *row in zip(keys, text, image, has, strict=True):
                        self._rows[key] = (row[0], row[1], bool(row[2][0]), bool(row[2][1]))
            except (SafetensorError, KeyError, ValueError, OSError) as error:
                self._warn("features.shard_ignored", path=str(path), error=str(error))

    def _write(self, keys: list[str]) -> None:
        rows = [self._rows[key] for key in keys]
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        save_file(
            {
                "text": np.stack([row[0] for row in rows]),
                "image": np.stack([row[1] for row in rows]),
                "has": np.array([row[2:] for row in rows], np.uint8),
            },
            unfinished,
            metadata={"keys": json.dumps(keys)},
        )
        os.replace(unfinished, self.folder / f"{uuid.uuid4().hex}.safetensors")


def content_key(content: ItemContent) -> str:
    """Hash over the towers' input: text, category (it is part of the text) and picture."""
    picture = hashlib.sha256(content.image).hexdigest() if content.image else None
    parts = json.dumps([content.title, content.text, content.category, picture], ensure_ascii=False)
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]


def prepared(
    towers: MultiModalEncoder,
    contents: Sequence[ItemContent],
    *,
    on_progress: Callable[[int], None] = lambda done: None,
    warn: Warn = _ignore,
) -> Iterator[list[Prepared]]:
    """The towers' inputs of these items, in parts. A picture that cannot be decoded counts as missing."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        for start in range(0, len(contents), _ROWS_PER_PASS):
            part = list(
                threads.map(lambda content: _prepared(towers, content, warn), contents[start : start + _ROWS_PER_PASS])
            )
            yield part
            on_progress(len(part))


def _prepared(towers: MultiModalEncoder, content: ItemContent, warn: Warn) -> Prepared:
    try:
        return towers.prepare(content)
    except EncodingFailed as error:
        if error.reason is Reason.NO_CONTENT or content.image is None:
            return Prepared(tokens=None, pixels=None)
        warn("features.picture_ignored", item_id=content.item_id, reason=str(error.reason))
        return _prepared(towers, ItemContent(title=content.title, text=content.text, category=content.category), warn)
