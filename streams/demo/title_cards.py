"""Title cards: pictures drawn from title, genres and year, for films whose posters may not be distributed."""

from __future__ import annotations

import colorsys
import hashlib
import io
from collections.abc import Sequence
from importlib.resources import files

from PIL import Image, ImageDraw, ImageFont

from trainer.datasets.folder import ItemRecord

WIDTH, HEIGHT = 120, 180
_MARGIN = 10

_HUES = {
    "Action": 0.02, "Adventure": 0.09, "Animation": 0.14, "Biography": 0.11, "Comedy": 0.16, "Crime": 0.62,
    "Documentary": 0.33, "Drama": 0.58, "Family": 0.20, "Fantasy": 0.78, "Film-Noir": 0.66, "History": 0.07,
    "Horror": 0.97, "Music": 0.86, "Musical": 0.88, "Mystery": 0.72, "Romance": 0.93, "Sci-Fi": 0.50,
    "Short": 0.28, "Sport": 0.38, "Thriller": 0.68, "War": 0.24, "Western": 0.05,
}  # fmt: skip


class TitleCards:
    """Draws each item's card from its title and the attributes `genres` ("Drama, War") and `release_year`.

    The first genre gives the colour, the others the stripes, the year the brightness: the same record gives the same
    card, byte for byte, on one version of Pillow.
    """

    def __init__(self) -> None:
        # matplotlib carries a font that has accents; Pillow's own has none
        font = str(files("matplotlib") / "mpl-data/fonts/ttf/DejaVuSans.ttf")
        self._large = ImageFont.truetype(font, 14)
        self._small = ImageFont.truetype(font, 9)

    def of(self, records: Sequence[ItemRecord]) -> list[bytes | None]:
        """One JPEG per item."""
        return [self._draw(record) for record in records]

    def _draw(self, record: ItemRecord) -> bytes:
        genres = [genre for genre in str(record.attributes.get("genres") or "Unknown").split(", ") if genre]
        year = int(record.attributes.get("release_year") or 1950)
        brightness = 0.3 + 0.4 * min(max((year - 1900) / 120, 0.0), 1.0)
        card = Image.new("RGB", (WIDTH, HEIGHT), _colour(genres[0], brightness))
        pen = ImageDraw.Draw(card)
        for place, genre in enumerate(genres[1:5]):
            top = HEIGHT - 58 - 9 * place
            pen.rectangle((0, top, WIDTH, top + 6), fill=_colour(genre, min(brightness + 0.15, 1.0)))
        pen.multiline_text(
            (_MARGIN, _MARGIN), self._wrapped(pen, record.title), font=self._large, fill="white", spacing=2
        )
        pen.text((_MARGIN, HEIGHT - 44), "\n".join(genres[:2]), font=self._small, fill="white", spacing=1)
        pen.text((_MARGIN, HEIGHT - 18), str(year), font=self._small, fill="white")
        encoded = io.BytesIO()
        card.save(encoded, "JPEG", quality=80)
        return encoded.getvalue()

    def _wrapped(self, pen: ImageDraw.ImageDraw, title: str) -> str:
        lines: list[str] = []
        for word in title.split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and pen.textlength(longer, font=self._large) <= WIDTH - 2 * _MARGIN:
                lines[-1] = longer
            else:
                lines.append(word)
        return "\n".join(lines[:5])


def _colour(genre: str, brightness: float) -> tuple[int, int, int]:
    hue = _HUES.get(genre)
    if hue is None:
        hue = hashlib.sha256(genre.encode()).digest()[0] / 256
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)
