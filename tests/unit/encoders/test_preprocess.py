"""Pictures and texts from strangers."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageFile, WebPImagePlugin

from encoders.base import ItemContent
from encoders.image_formats import ACCEPT, ImageFormat, sniff
from encoders.preprocess import ImageLimits, decode_image, join_text
from schemas.errors import EncodingFailed, Reason

FORMATS: tuple[str, ...] = get_args(ImageFormat)
LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)
RED, WHITE = (220, 20, 30), (255, 255, 255)


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def decode(data: bytes, size: int = 16, limits: ImageLimits = LIMITS) -> np.ndarray:
    pixels = decode_image(data, size=size, limits=limits)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
    return pixels


def solid(*size: int) -> Image.Image:
    return Image.new("RGB", size, RED)


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def assert_red(data: bytes, *, atol: float) -> None:
    np.testing.assert_allclose(decode(data).reshape(-1, 3).mean(0), RED, atol=atol)


def refused(data: bytes, limits: ImageLimits = LIMITS) -> EncodingFailed:
    with pytest.raises(EncodingFailed) as raised:
        decode_image(data, size=16, limits=limits)
    return raised.value


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and has a few bytes of pixels: a bomb's wrapping."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


class TestFormats:
    @pytest.mark.parametrize("image_format", FORMATS)
    def test_each_format_decodes_to_its_colour(self, image_format: str) -> None:
        assert_red(encoded(solid(40, 60), image_format), atol=4)

    def test_what_is_asked_for_is_what_is_decoded(self) -> None:
        asked = {part.split(";")[0].removeprefix("image/").upper() for part in ACCEPT.split(",")}
        assert asked == set(FORMATS)

    @pytest.mark.parametrize(
        ("data", "name"),
        [
            (b"\0\0\0\x20ftypavif" + bytes(52), "an AVIF"),
            (b"\0\0\0\x20ftypheic" + bytes(52), "a HEIC"),
            (b"<?xml version='1.0'?><svg/>", "an SVG"),
            (b"\xef\xbb\xbf\n<!DOCTYPE html><p>", "an HTML page"),
            (b"", "empty"),
            (b"\0\0\0\x20ftypavis" + bytes(52), "an AVIF"),
            (b"\0\0\0\x20ftypheix" + bytes(52), "a HEIC"),
            (b"\0\0\0\x20ftypmif1" + bytes(52), "a HEIF"),
            (b"\0\0\0\x20ftypmp42" + bytes(52), "something else"),
            (b"<SVG>", "an SVG"),
            (b"<html>", "an HTML page"),
            (b"  <HEAD>", "an HTML page"),
            (b"<body>", "an HTML page"),
            (b"<!-- x -->", "an HTML page"),
            (b"x <html>", "something else"),
            (b"x" * 64 + b"<svg/>", "something else"),
        ],
    )
    def test_a_format_that_is_refused_is_named(self, data: bytes, name: str) -> None:
        error = refused(data)
        assert error.reason is Reason.BAD_IMAGE
        assert name in error.detail and "WebP, GIF or BMP" in error.detail

    @pytest.mark.parametrize("compression", [1, 2])
    def test_a_bmp_that_python_would_unpack_byte_by_byte_is_refused(self, compression: int) -> None:
        data = bytearray(encoded(Image.new("L", (64, 64)), "BMP"))
        data[30:34] = compression.to_bytes(4, "little")
        assert "run lengths" in refused(bytes(data)).detail

    @pytest.mark.parametrize("image_format", ["TIFF", "PPM", "ICO"])
    def test_other_formats_are_refused_whatever_pillow_could_do(self, image_format: str) -> None:
        assert refused(encoded(solid(32, 32), image_format)).reason is Reason.BAD_IMAGE

    @pytest.mark.parametrize(
        "data", [b"", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"<svg/>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n"]
    )
    def test_bytes_that_are_no_picture_are_refused(self, data: bytes) -> None:
        assert refused(data).reason is Reason.BAD_IMAGE

    def test_the_first_bytes_decide_not_a_name(self) -> None:
        assert sniff(encoded(Image.new("RGB", (4, 4)), "WEBP")) == "WEBP"
        assert sniff(b"BM is how this text begins, which is no picture") is None
        assert [sniff(b"GIF8%da" % n) for n in (7, 8, 9)] == ["GIF", None, "GIF"]
        assert sniff(b"RIFF\0\0\0\0WAVE") is sniff(b"RIFX\0\0\0\0WEBP") is sniff(b"\xff\xd8") is None
        headers = [n for n in range(256) if sniff(b"BM" + bytes(12) + n.to_bytes(4, "little"))]
        assert headers == [12, 40, 52, 56, 64, 108, 124]

    @settings(max_examples=150, deadline=None)
    @given(
        image_format=st.sampled_from(FORMATS),
        at=st.floats(0, 1, exclude_max=True),
        value=st.binary(min_size=1, max_size=8),
    )
    def test_any_damage_either_decodes_or_is_refused_as_a_picture(
        self, image_format: str, at: float, value: bytes
    ) -> None:
        data = bytearray(encoded(Image.radial_gradient("L").resize((48, 48)).convert("RGB"), image_format))
        place = int(at * len(data))
        data[place : place + len(value)] = value
        try:
            decode(bytes(data))
        except EncodingFailed as error:
            assert error.reason in (Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE)  # noqa: PT017


class TestTruncation:
    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
    def test_a_truncated_picture_is_refused(self, image_format: str, part: float) -> None:
        data = encoded(noise(96), image_format)
        assert refused(data[: int(part * len(data))]).reason is Reason.BAD_IMAGE


class TestSize:
    def test_too_many_bytes_are_refused_before_anything_is_read(self) -> None:
        error = refused(b"\xff\xd8\xff" + b"\0" * 100, ImageLimits(max_bytes=50, max_pixels=100))
        assert error.reason is Reason.IMAGE_TOO_LARGE
        assert "103" in error.detail
        data = encoded(solid(8, 8))
        decode(data, limits=ImageLimits(max_bytes=len(data), max_pixels=64))
        error = refused(data, ImageLimits(max_bytes=len(data) - 1, max_pixels=64))
        assert f"has {len(data)} bytes, the limit is {len(data) - 1}" in error.detail

    @pytest.mark.parametrize("side", [50_000, 10_000])
    def test_a_bomb_within_the_settings_is_refused_as_too_large(self, side: int) -> None:
        data = png_header_only(side, side)
        assert refused(data, ImageLimits(max_bytes=1_000, max_pixels=10**12)).reason is Reason.IMAGE_TOO_LARGE

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_a_picture_for_which_memory_was_wanting_is_not_refused(
        self, image_format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(image: ImageFile.ImageFile) -> None:
            raise MemoryError

        data = encoded(solid(8, 8), image_format)
        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", load)
        with pytest.raises(MemoryError):
            decode(data)

    @pytest.mark.parametrize("size", [(50_000, 50_000), (1_000_001, 1), (1, 1_000_001), (2**31 - 1, 2**31 - 1)])
    def test_a_bomb_is_refused_by_its_header(self, size: tuple[int, int]) -> None:
        assert refused(png_header_only(*size)).reason is Reason.IMAGE_TOO_LARGE

    @pytest.mark.parametrize("image_format", FORMATS)
    def test_one_pixel_over_the_limit_is_refused_and_the_limit_itself_is_not(self, image_format: str) -> None:
        limits = ImageLimits(max_bytes=1_000_000, max_pixels=100 * 100)
        decode(encoded(solid(100, 100), image_format), limits=limits)
        error = refused(encoded(solid(101, 100), image_format), limits)
        assert error.reason is Reason.IMAGE_TOO_LARGE
        assert "101 x 100" in error.detail

    def test_a_jpeg_of_thousands_of_scans_is_refused(self) -> None:
        data = encoded(solid(8, 8), "JPEG")
        assert refused(data[:-2] + b"\xff\xda\x00\x08" * 500 + data[-2:]).reason is Reason.BAD_IMAGE
        scans = data.count(b"\xff\xda")
        assert "more than 100 scans" in refused(data + b"\xff\xda" * (101 - scans)).detail
        decode(data + b"\xff\xda" * (100 - scans))  # behind the end of the picture

    def test_a_progressive_photo_is_not_mistaken_for_it(self) -> None:
        decode(encoded(noise(400), "JPEG", progressive=True, quality=95))

    @pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
    def test_tiny_and_narrow_pictures_decode(self, size: tuple[int, int]) -> None:
        assert_red(encoded(solid(*size)), atol=2)

    @pytest.mark.parametrize("size", [(30, 300), (300, 30)])
    def test_nothing_of_a_tall_or_wide_picture_is_cut_off(self, size: tuple[int, int]) -> None:
        ends = [(0, 0, size[0], 20), (0, size[1] - 20, size[0], size[1])]
        if size[0] > size[1]:
            ends = [(0, 0, 20, size[1]), (size[0] - 20, 0, size[0], size[1])]
        image = Image.new("RGB", size, WHITE)
        image.paste(RED, ends[0])
        image.paste((0, 0, 200), ends[1])
        pixels = decode(encoded(image))
        first, last = (pixels[8, 0], pixels[8, -1]) if size[0] > size[1] else (pixels[0, 8], pixels[-1, 8])
        np.testing.assert_allclose(first, RED, atol=20)
        np.testing.assert_allclose(last, (0, 0, 200), atol=20)

    def test_a_large_jpeg_comes_out_like_the_same_picture_sent_small(self) -> None:
        large = Image.radial_gradient("L").resize((960, 960), Image.Resampling.BICUBIC).convert("RGB")
        small = large.resize((64, 64), Image.Resampling.LANCZOS)
        difference = decode(encoded(large, "JPEG", quality=95), 32).astype(int) - decode(encoded(small), 32)
        assert np.abs(difference).max() < 12


class TestModes:
    def test_transparency_is_laid_on_white(self) -> None:
        clear = Image.new("RGBA", (20, 20), (*RED, 0))
        np.testing.assert_array_equal(decode(encoded(clear)).reshape(-1, 3), np.tile(WHITE, (256, 1)))
        half = decode(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 128))))
        np.testing.assert_allclose(half, 127, atol=1)

    @pytest.mark.parametrize("mode", ["L", "LA", "1"])
    def test_grey_pictures_decode_to_grey(self, mode: str) -> None:
        np.testing.assert_array_equal(decode(encoded(Image.new("L", (20, 20), 255).convert(mode))), 255)

    def test_palettes_decode_with_and_without_a_transparent_colour(self) -> None:
        image = solid(20, 20).quantize(4)
        assert_red(encoded(image), atol=3)
        transparent = encoded(image, transparency=image.getpixel((0, 0)))
        np.testing.assert_array_equal(decode(transparent), 255)

    def test_a_transparent_colour_of_an_rgb_png_is_white(self) -> None:
        np.testing.assert_array_equal(decode(encoded(solid(20, 20), transparency=RED)), 255)

    def test_a_transparent_shade_of_a_grey_png_is_white_and_so_is_a_clear_grey(self) -> None:
        grey = Image.new("L", (20, 20), 90)
        np.testing.assert_array_equal(decode(encoded(grey, transparency=90)), 255)
        np.testing.assert_array_equal(decode(encoded(grey, transparency=91)), 90)
        np.testing.assert_array_equal(decode(encoded(Image.new("LA", (20, 20), (90, 0)))), 255)

    def test_cmyk_photos_decode_to_their_colour(self) -> None:
        assert_red(encoded(solid(40, 40).convert("CMYK"), "JPEG"), atol=6)

    def test_cmyk_photos_without_adobes_marker_do_so_too(self) -> None:
        """Pillow writes the marker and inverted inks; without the marker inks are not inverted."""
        adobe = encoded(ImageChops.invert(solid(40, 40).convert("CMYK")), "JPEG")
        start = adobe.index(b"\xff\xee")
        plain = adobe[:start] + adobe[start + 2 + int.from_bytes(adobe[start + 2 : start + 4], "big") :]
        assert b"Adobe" in adobe and b"Adobe" not in plain
        assert_red(plain, atol=6)

    @pytest.mark.parametrize("value", [0, 12_000, 40_000, 65_535])
    def test_sixteen_bit_grey_is_scaled_not_clipped(self, value: int) -> None:
        deep = Image.fromarray(np.full((20, 20), value, dtype=np.uint16))
        np.testing.assert_allclose(decode(encoded(deep)), value / 257, atol=1)

    @pytest.mark.parametrize(("image_format", "options"), [("WEBP", {"lossless": True}), ("GIF", {})])
    def test_a_moving_picture_counts_as_its_first_frame(self, image_format: str, options: dict[str, Any]) -> None:
        frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, WHITE)]
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert_red(data, atol=3)


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_photo_comes_out_upright(self, orientation: int) -> None:
        upright = Image.new("RGB", (64, 64), WHITE)
        upright.paste((255, 0, 0), (0, 0, 32, 32))
        upright.paste((0, 0, 255), (32, 0, 64, 32))
        stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse turn of each, as a Transpose
        image = upright if orientation == 1 else upright.transpose(Image.Transpose(stored[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = decode(encoded(image, "JPEG", exif=exif, quality=95))
        np.testing.assert_allclose(pixels, decode(encoded(upright, "JPEG", quality=95)), atol=12)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_exif_does_not_cost_the_picture(self) -> None:
        data = encoded(solid(32, 32), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
        assert_red(data, atol=4)


class TestText:
    def test_title_comes_first_and_description_last(self) -> None:
        content = ItemContent(title="Wool coat.", text="Lined.  With\nbuttons", category="Coat")
        assert join_text(content, max_characters=100) == "Wool coat. Coat. Lined. With buttons"

    def test_a_description_alone_is_text(self) -> None:
        assert join_text(ItemContent(text="Lined", category="Coat"), max_characters=100) == "Coat. Lined"

    def test_a_category_alone_is_no_text(self) -> None:
        assert join_text(ItemContent(category="Coat"), max_characters=100) == ""

    def test_what_is_too_long_is_cut_at_the_end(self) -> None:
        assert join_text(ItemContent(title="Coat", text="x" * 30_000), max_characters=10) == "Coat. xxxx"

    def test_points_at_the_ends_of_parts_are_no_more_than_one_and_those_inside_stay(self) -> None:
        content = ItemContent(title="Size 1.5...", text="Warm.", category="A. B.")
        assert join_text(content, max_characters=100) == "Size 1.5. A. B. Warm"
        assert join_text(ItemContent(title="Coat.", category=" "), max_characters=100) == "Coat"
        assert join_text(ItemContent(title="x" * 50), max_characters=10) == "x" * 10

    def test_equal_looking_titles_are_equal(self) -> None:
        composed, decomposed = ItemContent(title="Café"), ItemContent(title="Cafe\u0301")
        assert join_text(composed, max_characters=50) == join_text(decomposed, max_characters=50)

    @given(st.text(alphabet=st.characters(), max_size=60))
    def test_any_text_can_be_sent_on(self, title: str) -> None:
        line = join_text(ItemContent(title=title), max_characters=50)
        assert len(line.encode()) >= len(line)
        assert line.isprintable() or not line.isascii()
