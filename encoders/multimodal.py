"""MultiModalEncoder: two towers and a fixed fusion as an `Encoder`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from encoders.base import ItemContent, Prepared
from encoders.features import ItemFeatures
from encoders.fixed_fusion import FixedFusion
from encoders.image import ImageTower
from encoders.preprocess import ImageLimits, decode_image, join_text
from encoders.text import TextTower
from schemas.errors import EncodingFailed, Reason

_CHARACTERS_PER_TOKEN = 12
"""Above the average of any text; longer texts are cut before the tokenizer."""


class MultiModalEncoder:
    """Title, category, description and picture of an item as one unit vector.

    Vectors do not depend on the batch: bit-identical on a CPU with one thread per pass in fp32, up to float rounding
    (1e-5) elsewhere. Other processors and torch releases differ by about as much. With bf16 a number may change by .01
    from batch to batch and with fp16 by .001, at a cosine above .9999.

    `encode` is thread-safe. On a CPU concurrent passes, each on one core, are faster than one on all cores.
    """

    def __init__(
        self, *, version: str, text: TextTower, image: ImageTower, fusion: FixedFusion, limits: ImageLimits
    ) -> None:
        if (text.width, image.width) != (len(fusion.text.mean), len(fusion.image.mean)):
            raise ValueError(
                f"towers make {text.width} and {image.width} features, the fusion was made for "
                f"{len(fusion.text.mean)} and {len(fusion.image.mean)}"
            )
        self._version = version
        self.text, self.image = text, image
        self._fusion, self._limits = fusion, limits

    @property
    def version(self) -> str:
        """Content-addressed `EncoderVersion`."""
        return self._version

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self._fusion.dim

    @property
    def tower_widths(self) -> tuple[int, int]:
        """Widths of the text and of the image features."""
        return self.text.width, self.image.width

    def tower_features(self, batch: Sequence[Prepared]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Tower features of a batch before the fusion: (n, T) and (n, I), zero rows for missing modalities."""
        text = np.zeros((len(batch), self.text.width), np.float32)
        image = np.zeros((len(batch), self.image.width), np.float32)
        texts = [(row, item.tokens) for row, item in enumerate(batch) if item.tokens is not None]
        pictures = [(row, item.pixels) for row, item in enumerate(batch) if item.pixels is not None]
        if texts:
            text[[row for row, _ in texts]] = self.text.features([tokens for _, tokens in texts])
        if pictures:
            image[[row for row, _ in pictures]] = self.image.features([pixels for _, pixels in pictures])
        return text, image

    def prepare(self, content: ItemContent) -> Prepared:
        """Check, decode, resize and tokenise one item. Pure and thread-safe.

        Raises `EncodingFailed`: `BAD_IMAGE`, `IMAGE_TOO_LARGE`, or `NO_CONTENT` if there is neither text nor picture.
        """
        line = join_text(content, max_characters=_CHARACTERS_PER_TOKEN * self.text.max_tokens)
        tokens = self.text.tokenize(line) if line else None
        pixels = None
        if content.image is not None:
            pixels = decode_image(content.image, size=self.image.size, limits=self._limits)
        if tokens is None and pixels is None:
            raise EncodingFailed(Reason.NO_CONTENT, f"item {content.item_id!r} has neither text nor picture")
        return Prepared(tokens=tokens, pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(n, dim) unit rows in the order of `batch`.

        Raises `EncodingFailed` with `BAD_VECTOR` if a tower's output is not finite: a fault of the weights.
        """
        texts = [(row, item.tokens) for row, item in enumerate(batch) if item.tokens is not None]
        pictures = [(row, item.pixels) for row, item in enumerate(batch) if item.pixels is not None]
        return self._fusion(
            len(batch),
            np.array([row for row, _ in texts], dtype=np.intp),
            self.text.features([tokens for _, tokens in texts]),
            np.array([row for row, _ in pictures], dtype=np.intp),
            self.image.features([pixels for _, pixels in pictures]),
        )

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """As items: nothing was learned from queries."""
        return self.encode(batch)

    def query_vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        """As items."""
        return self.vectors(features)

    def vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        """What `encode` makes of items with these tower features: (n, dim) unit rows. Each item has a modality."""
        text_rows, image_rows = np.flatnonzero(features.has_text_N), np.flatnonzero(features.has_image_N)
        return self._fusion(
            len(features), text_rows, features.text_NT[text_rows], image_rows, features.image_NI[image_rows]
        )
