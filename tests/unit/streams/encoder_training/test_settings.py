"""Settings of encoder training that would have no effect are refused by name, and those of the user win."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from encoders.fusion_config import FusionConfig
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import check_shape
from trainer.csft.config import CsftConfig
from trainer.offline.encoder_versions import FOR_CLICK_MODELS, WIDE_HEADS, for_click_models


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fused_level": 0, "image_level": 0, "title_level": 0}, "fused_level, image_level and title_level"),
        ({"purchase_weight": 0, "cart_weight": 0, "click_weight": 0}, "purchase_weight, cart_weight and click_weight"),
        ({"hard_loss": "triplet", "hard_negatives": False}, "hard_negatives is off"),
        ({"bank_rows": "stored", "time_negatives": 8, "space_negatives": 8}, "leave out space_negatives"),
        ({"bank_rows": "stored"}, "without time_negatives"),
        ({"temperature": 0.6}, "between min_temperature and max_temperature"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CsftConfig(**given)


def test_scl_of_any_settings_is_itself_accepted() -> None:
    for given in ({}, {"space_negatives": 64, "fused_level": 2.0}, {"bank_takes": 4}):
        scl = CsftConfig(**given).as_scl()
        assert CsftConfig.model_validate(scl.model_dump()) == scl


def test_a_shape_that_was_set_and_that_the_parent_has_otherwise_is_refused_and_defaults_are_not() -> None:
    parent = FusionConfig(kind="tensor", text_rank=384)
    check_shape(FusionConfig(), parent)
    check_shape(FusionConfig(text_rank=384), parent)
    with pytest.raises(Misconfigured, match="MIM_FUSION__KIND=tensor"):
        check_shape(FusionConfig(kind="gated", text_rank=384), parent)
    with pytest.raises(Misconfigured, match="MIM_FUSION__TEXT_RANK=384"):
        check_shape(FusionConfig(text_rank=192), parent)


def test_the_evaluation_uses_its_own_choices_only_where_the_user_made_none() -> None:
    csft, shape = for_click_models(CsftConfig(epochs=2), FusionConfig(width=96))
    assert csft == CsftConfig(epochs=2, **FOR_CLICK_MODELS) and shape == FusionConfig(width=96, **WIDE_HEADS)
    # also where the user's choice is the default
    csft, shape = for_click_models(CsftConfig(log_q_strength=0.5), FusionConfig(text_rank=192))
    assert (csft.log_q_strength, csft.temperature) == (0.5, FOR_CLICK_MODELS["temperature"])
    assert (shape.text_rank, shape.image_rank) == (192, WIDE_HEADS["image_rank"])
