"""What encoders get of an item, when two inputs are the same one, and bounds of the settings."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from encoders.base import ItemContent, Prepared
from encoders.bundle import FusionSpec, ImageSpec, TextSpec
from encoders.calibration import calibration_items, loose_words
from encoders.config import EncoderConfig
from encoders.digests import files_sha256
from encoders.fusion_config import FusionConfig
from schemas.items import ItemPublished

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("image", [None, b"fetched"])
def test_every_field_that_encoders_read_is_taken_from_the_item_and_the_picture_from_the_fetch(
    image: bytes | None,
) -> None:
    item = ItemPublished(
        item_id="a", title="coat", text="of wool", category="Coats", price=5.0, year=2001, image=b"AAAA",
        published_at=NOW,
    )  # fmt: skip
    expected = ItemContent("a", title="coat", text="of wool", category="Coats", price=5.0, image=image, year=2001)
    assert ItemContent.of(item, image) == expected


PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
PREPARED = Prepared(tokens=(1, 2), pixels=PIXELS, category="c", year=2001, price=5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (1, 3)}, {"tokens": (12,)}, {"tokens": None}, {"pixels": PIXELS + 1}, {"pixels": None},
        {"pixels": PIXELS.reshape(2, 8, 3)}, {"category": "d"}, {"category": None}, {"year": None}, {"year": 2002},
        {"price": None}, {"price": 5.5},
    ],
)  # fmt: skip
def test_whatever_may_change_a_vector_changes_the_address(change: dict[str, Any]) -> None:
    assert replace(PREPARED, **change).address != PREPARED.address


def test_equal_inputs_have_one_address_however_their_pixels_lie_in_memory() -> None:
    again = Prepared(tokens=(1, 2), pixels=np.asfortranarray(PIXELS), category="c", year=2001, price=5.0)
    assert again.address == PREPARED.address


@pytest.mark.parametrize(
    ("model", "given", "fits"),
    [
        (EncoderConfig, {"max_image_bytes": 1_024, "max_image_pixels": 4_096, "num_threads": 1, "width": 8}, True),
        (EncoderConfig, {"max_image_bytes": 1_023}, False),
        (EncoderConfig, {"max_image_pixels": 4_095}, False),
        (EncoderConfig, {"num_threads": 0}, False),
        (EncoderConfig, {"num_threads": 256}, True),
        (EncoderConfig, {"num_threads": 257}, False),
        (EncoderConfig, {"width": 7}, False),
        (EncoderConfig, {"device": "cuda"}, True),
        (EncoderConfig, {"device": "cuda:10"}, True),
        (EncoderConfig, {"device": "mps"}, True),
        (EncoderConfig, {"device": "gpu"}, False),
        (EncoderConfig, {"device": "cuda:x"}, False),
        (EncoderConfig, {"device": "xcpu"}, False),
        (EncoderConfig, {"precision": "fp8"}, False),
        (EncoderConfig, {"text": "x"}, False),
        (FusionConfig, {"width": 8, "nested_widths": (7, 1)}, True),
        (FusionConfig, {"width": 7, "nested_widths": ()}, False),
        (FusionConfig, {"width": 64, "nested_widths": (0,)}, False),
        (FusionConfig, {"width": 64, "nested_widths": (8, 64)}, False),
        (FusionConfig, {"hidden": 0, "text_rank": 8, "image_rank": 8, "category_rows": 16, "knots": 2}, True),
        (FusionConfig, {"knots": 1}, False),
        (FusionConfig, {"text_rank": 7}, False),
        (FusionConfig, {"image_rank": 7}, False),
    ],
)
def test_bounds_of_settings_are_inside(model: type[BaseModel], given: dict[str, Any], fits: bool) -> None:
    if fits:
        model.model_validate(given)
    else:
        with pytest.raises(ValidationError):
            model.model_validate(given)


WEIGHTS = {"path": "x", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("model", "given", "fits"),
    [
        (TextSpec, {"max_tokens": 8}, True),
        (TextSpec, {"max_tokens": 7}, False),
        (TextSpec, {"max_tokens": 8192}, True),
        (TextSpec, {"max_tokens": 8193}, False),
        (TextSpec, {"max_tokens": 8, "weights": WEIGHTS | {"sha256": "0" * 63}}, False),
        (TextSpec, {"max_tokens": 8, "weights": WEIGHTS | {"sha256": "G" * 64}}, False),
        (ImageSpec, {"kind": "transformers", "size": 16}, True),
        (ImageSpec, {"kind": "transformers", "size": 15}, False),
        (ImageSpec, {"kind": "efficientnet-lite0", "size": 1024}, True),
        (ImageSpec, {"kind": "efficientnet-lite0", "size": 1025}, False),
        (FusionSpec, {"image_share": 0.0}, False),
        (FusionSpec, {"image_share": 1.0}, False),
        (FusionSpec, {"image_share": 0.001}, True),
    ],
)
def test_bounds_of_a_bundles_parts_are_inside(model: type[BaseModel], given: dict[str, Any], fits: bool) -> None:
    whole = ({"recipe": "r"} if model is FusionSpec else {"weights": WEIGHTS}) | given
    if fits:
        model.model_validate(whole)
    else:
        with pytest.raises(ValidationError):
            model.model_validate(whole)


def test_calibration_items_are_half_goods_half_films_without_pictures() -> None:
    goods, films = calibration_items(400)[::2], calibration_items(400)[1::2]
    assert not any(item.image or item.price or item.year for item in [*goods, *films])
    assert all(item.title for item in goods) and any(item.text for item in goods)
    assert all(item.title and item.category and not item.text for item in films)
    assert any("," in (item.category or "") for item in films)
    assert None in {item.category for item in goods}
    assert calibration_items(400) != calibration_items(400, seed=1)
    assert calibration_items(100) == calibration_items(400)[:100]


def test_loose_words_are_three_different_words_a_line() -> None:
    lines = [line.split() for line in loose_words(["a", "b", "c", "d"], 50)]
    assert len(lines) == 50 and all(len(set(line)) == 3 for line in lines)
    assert loose_words("abcd", 50) == loose_words("abcd", 50) != loose_words("abcd", 50, seed=1)


def test_a_digest_of_files_tells_names_from_bytes(tmp_path: Any) -> None:
    for name, data in (("a", b"1"), ("ab", b"1"), ("b", b"1")):
        (tmp_path / name).write_bytes(data)
    assert len({files_sha256(tmp_path, [name]) for name in ("a", "ab", "b")}) == 3
