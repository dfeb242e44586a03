"""The picture formats that are decoded, recognised by their first bytes."""

from __future__ import annotations

from typing import Literal

ImageFormat = Literal["JPEG", "PNG", "WEBP"]

SNIFFED_BYTES = 12
"""Number of bytes that `sniff` needs."""


def sniff(data: bytes | bytearray) -> ImageFormat | None:
    """The format of these first bytes; None if it is not one that is decoded."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None
