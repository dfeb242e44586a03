"""Which releases are refused, and how much of a history is used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schemas.errors import Misconfigured
from tests.factories.releases import make_manifest
from tests.factories.samples import DIM, SMALL_MODEL, unit_vector
from trainer.features.config import FeatureConfig
from trainer.networks.ciubm import CiUBM
from trainer.networks.item_rows import ItemRows, RequestMoment
from trainer.networks.scorer import Scorer

FEATURES = FeatureConfig()
CONFIG: dict[str, Any] = {
    "model": SMALL_MODEL.model_dump(mode="json"),
    "features": FEATURES.model_dump(mode="json"),
    "history_length": 3,
}
VECTORS = {f"i{n}": unit_vector(n) for n in range(1, 10)}


def scorer_of(config: dict[str, Any] = CONFIG, *, dim: int = DIM) -> Scorer:
    manifest = make_manifest(1).model_copy(update={"config": config, "dim": dim})
    return Scorer.from_release(CiUBM(SMALL_MODEL, vector_width=DIM, seed=1).state_dict(), manifest)


@pytest.mark.parametrize(
    "config",
    [
        {name: value for name, value in CONFIG.items() if name != "model"},
        {name: value for name, value in CONFIG.items() if name != "history_length"},
        CONFIG | {"history_length": "many"},
        CONFIG | {"model": CONFIG["model"] | {"id_width": 0}},
        CONFIG | {"model": CONFIG["model"] | {"of another version": 1}},
        CONFIG | {"model": CONFIG["model"] | {"id_width": 5}},
    ],
    ids=["no model", "no length", "no number", "a value that is refused", "an unknown field", "another shape"],
)
def test_a_release_that_this_version_cannot_build_is_refused_with_the_way_out(config: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured, match=r"release r000001-\S+ was made by another version .*train again"):
        scorer_of(config)


def test_a_release_for_vectors_of_another_width_is_refused() -> None:
    with pytest.raises(Misconfigured, match="another version"):
        scorer_of(dim=DIM + 1)


@pytest.mark.parametrize("taken", range(6))
def test_the_newest_items_of_a_history_are_used_up_to_the_length(taken: int) -> None:
    scorer = scorer_of()
    assert scorer.history_length == 3
    history = [f"i{n}" for n in range(3, 3 + taken)]
    batch = scorer.prepare(ItemRows.of(["i1", "i2", *history], VECTORS, DIM), 2)
    assert batch.target_B.tolist() == [1, 2]
    assert batch.history_BL.tolist() == [[*range(2 + taken, 2, -1)][:3] or [0]]
    np.testing.assert_allclose(batch.dense_BF[:, 0], np.log1p(min(taken, 3)), atol=1e-3)
    assert len(scorer.probabilities(batch)) == 2


def test_of_a_longer_history_the_newest_takes_come_with_their_own_times() -> None:
    items, now = ItemRows.of(["i1", *(f"i{n}" for n in range(2, 7))], VECTORS, DIM), 50_000
    moment = replace(RequestMoment.unknown(FEATURES, items, 5), history_seconds=[0, 0, 0, 0, now - 3_600], now=now)
    idle = scorer_of().features_of(scorer_of().prepare(items, 1, moment))[0, FEATURES.names.index("user idle")]
    assert idle == pytest.approx(np.log1p(1), abs=1e-3)
