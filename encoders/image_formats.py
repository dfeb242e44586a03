"""The few picture formats that are decoded, told apart by their first bytes."""

from __future__ import annotations

from typing import Literal

ImageFormat = Literal["JPEG", "PNG", "WEBP"]

SNIFFED_BYTES = 12
"""How many bytes `sniff` needs."""


def sniff(data: bytes | bytearray) -> ImageFormat | None:
    """The format that the first bytes show; None if it is not one that we decode."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None
