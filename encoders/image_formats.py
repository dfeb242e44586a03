"""The picture formats that are decoded, recognised by their first bytes."""

from __future__ import annotations

from typing import Literal

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]

FORMATS = "JPEG, PNG, WebP, GIF or BMP"
"""The formats in words."""

ACCEPT = "image/jpeg,image/png,image/webp,image/gif;q=0.8,image/bmp;q=0.5"
"""The formats as the value of an HTTP header `Accept`."""

SNIFFED_BYTES = 64
"""Number of bytes that `sniff` and `other_format` need."""

_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIF"}


def sniff(data: bytes | bytearray) -> ImageFormat | None:
    """The format of these first bytes; None if it is not one that is decoded."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return "BMP"
    return None


def other_format(data: bytes | bytearray) -> str:
    """What these first bytes are, in words that repeat none of them, where `sniff` finds no format that is decoded.

    AVIF is not decoded: the size in its header does not bound the frame inside, which Pillow decodes whole.
    """
    begin = bytes(data[:SNIFFED_BYTES])
    if begin[4:8] == b"ftyp" and begin[8:12] in _BRANDS:
        return _BRANDS[begin[8:12]]
    if b"<svg" in begin.lower():
        return "an SVG"
    if is_page(begin):
        return "an HTML page"
    return "something else" if begin else "empty"


def is_page(data: bytes | bytearray) -> bool:
    """Whether these first bytes begin an HTML page."""
    begin = bytes(data[:SNIFFED_BYTES]).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return begin.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--"))
