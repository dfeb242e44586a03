"""Settings of C-SFT that do not go together, and the settings of SCL."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.behaviours import BehaviourKind
from trainer.csft.config import CsftConfig


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 0.019}, "temperature must lie between"),
        ({"temperature": 0.51}, "temperature must lie between"),
        ({"fused_level": 0, "image_level": 0, "title_level": 0}, "one of fused_level, image_level and title_level"),
        ({"purchase_weight": 0, "cart_weight": 0, "click_weight": 0}, "one of purchase_weight, cart_weight and click"),
        ({"hard_loss": "triplet", "hard_negatives": False}, "hard_negatives is off"),
        ({"bank_rows": "stored", "time_negatives": 5, "space_negatives": 1}, "leave out space_negatives"),
        ({"bank_rows": "stored"}, "no effect without time_negatives"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CsftConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.02},
        {"temperature": 0.5},
        *(
            {"fused_level": 0, "image_level": 0, "title_level": 0} | {name: 1}
            for name in ("image_level", "title_level")
        ),
        {"purchase_weight": 0, "cart_weight": 0},
        {"hard_loss": "triplet"},
        {"bank_rows": "stored", "time_negatives": 5},
    ],
)
def test_settings_at_their_bounds_are_taken(settings: dict[str, Any]) -> None:
    found = CsftConfig(**settings)
    assert {name: getattr(found, name) for name in settings} == settings


def test_a_positive_weighs_by_its_kind_and_an_exposure_nothing() -> None:
    config = CsftConfig(purchase_weight=3, cart_weight=2, click_weight=1)
    assert [config.weight_of(kind) for kind in BehaviourKind] == [0, 1, 2, 3]


def test_scl_has_a_loss_for_each_side_and_a_stored_bank_and_hides_nothing() -> None:
    config = CsftConfig(bank_takes=700, space_negatives=9, time_negatives=3, seed=4, epochs=6)
    assert config.as_scl() == CsftConfig(
        bank_takes=700, seed=4, epochs=6, fused_level=0, nested_level=0, image_level=1, title_level=1,
        anchor_view="same", anchor_items=1, hard_loss="triplet", space_negatives=0, time_negatives=700,
        bank_rows="stored", log_q_strength=0, drop_image=0, drop_text=0, drop_attributes=0, drop_features=0,
    )  # fmt: skip
