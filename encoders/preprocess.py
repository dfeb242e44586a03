"""Titles to text, picture bytes to pixels: the one place where untrusted content is decoded.

The first bytes of a picture decide its format, and its size is checked in the header before any pixel is decoded.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from encoders.base import ItemContent
from encoders.image_formats import FORMATS, ImageFormat, other_format, sniff
from schemas.errors import EncodingFailed, Reason

PREPROCESSING = "1"
"""Part of every encoder version. Raise it with any change here that can change a text or a pixel."""

_MAX_JPEG_SCANS = 100
"""Progressive pictures have about ten scans; decoding thousands takes minutes."""
_RUN_LENGTHS = (1, 2)
"""Compressions of a BMP that Pillow unpacks in Python: seconds for a picture within the limits."""
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """Size limits of a picture."""

    max_bytes: int
    """Encoded size."""
    max_pixels: int
    """Width times height, from the header."""


def join_text(content: ItemContent, *, max_characters: int) -> str:
    """Title, category and description as one line; empty if there is none of title and description.

    The title comes first and the description last, because long texts are cut at the end. A category alone is no
    content: it would give all items of the category one vector.
    """
    title, text = _clean(content.title), _clean(content.text[:max_characters])
    if not title and not text:
        return ""
    parts = [part for part in (title, _clean(content.category or ""), text) if part]
    return ". ".join(part.rstrip(".") for part in parts)[:max_characters]


def _clean(text: str) -> str:
    """NFC, without control and lone surrogate characters, white space as single spaces."""
    kept = "".join(
        character if unicodedata.category(character) not in ("Cc", "Cs") else " "
        for character in unicodedata.normalize("NFC", text)
    )
    return " ".join(kept.split())


def decode_image(data: bytes, *, size: int, limits: ImageLimits) -> NDArray[np.uint8]:
    """(size, size, 3) RGB pixels of an encoded picture: upright, transparency on white, squeezed to a square.

    Squeezed, not cropped: products fill their pictures, and a crop of a tall one loses its ends. Of an animation the
    first frame is used.

    Raises `EncodingFailed` with `IMAGE_TOO_LARGE` (too many bytes or pixels, by the header) or `BAD_IMAGE` (of
    another format, truncated or damaged).
    """
    if len(data) > limits.max_bytes:
        raise EncodingFailed(
            Reason.IMAGE_TOO_LARGE, f"picture has {len(data)} bytes, the limit is {limits.max_bytes} (max_image_bytes)"
        )
    image_format = sniff(data)
    if image_format is None:
        raise EncodingFailed(
            Reason.BAD_IMAGE, f"a picture has to be a {FORMATS}; this is {other_format(data)} ({data[:12].hex()})"
        )
    # an FF inside JPEG data is always followed by 00 or a restart, so this counts real scan headers
    if image_format == "JPEG" and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise EncodingFailed(Reason.BAD_IMAGE, f"JPEG has more than {_MAX_JPEG_SCANS} scans")
    try:
        return _decode(data, image_format, size, limits)
    except (EncodingFailed, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise EncodingFailed(Reason.IMAGE_TOO_LARGE, str(error)) from None
    except Exception as error:  # Pillow's decoders raise many types on damaged bytes
        raise EncodingFailed(Reason.BAD_IMAGE, f"{image_format}: {error or type(error).__name__}") from error


def _decode(data: bytes, image_format: ImageFormat, size: int, limits: ImageLimits) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=[image_format]) as opened:  # reads the header only
        width, height = opened.size
        if width * height > limits.max_pixels:
            raise EncodingFailed(
                Reason.IMAGE_TOO_LARGE,
                f"picture is {width} x {height} pixels, the limit is {limits.max_pixels} (max_image_pixels)",
            )
        if image_format == "BMP" and opened.info.get("compression", 0) in _RUN_LENGTHS:
            raise EncodingFailed(Reason.BAD_IMAGE, "BMP with run lengths, which are unpacked a byte at a time")
        orientation = _orientation(opened)
        if image_format == "JPEG":
            opened.draft("RGB", (size, size))  # decodes a large photo at 1/2, 1/4 or 1/8 of its size
        opened.load()
        whole = opened if not _is_plain_cmyk(opened) else ImageChops.invert(opened)
        small = _on_white(_to_eight_bits(whole).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))
    if orientation in _UPRIGHT:
        small = small.transpose(_UPRIGHT[orientation])
    return np.array(small, dtype=np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the picture may be valid although its EXIF is damaged
        return 1


def _is_plain_cmyk(image: Image.Image) -> bool:
    """Whether this is a CMYK JPEG without Adobe's marker: Pillow reads all of them as Adobe writes them, inverted."""
    return image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The picture in a mode that can be resized: RGB, RGBA or L."""
    if image.mode.startswith("I"):  # 16-bit grey; converting would clip instead of scale
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGB", "RGBA", "L"):
        # a single transparent colour of an RGB or L picture becomes a real alpha channel
        return image.convert("RGBA") if "transparency" in image.info else image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
