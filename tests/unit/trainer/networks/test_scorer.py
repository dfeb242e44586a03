"""Which releases are refused, how much of a history is used, and where a search stands."""

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
from trainer.networks.collate import dense_width
from trainer.networks.item_rows import ItemRows, RequestMoment
from trainer.networks.scorer import Scorer

FEATURES = FeatureConfig()
CONFIG: dict[str, Any] = {
    "model": SMALL_MODEL.model_dump(mode="json"),
    "features": FEATURES.model_dump(mode="json"),
    "history_length": 3,
}
TAUGHT = FeatureConfig(queries=True)
SEARCHING = CONFIG | {"features": TAUGHT.model_dump(mode="json")}
VECTORS = {f"i{n}": unit_vector(n) for n in range(1, 10)}


def scorer_of(config: dict[str, Any] = CONFIG, *, dim: int = DIM) -> Scorer:
    features = TAUGHT if config is SEARCHING else FEATURES
    manifest = make_manifest(1, features=features.version).model_copy(update={"config": config, "dim": dim})
    width = dense_width(features)
    network = CiUBM(SMALL_MODEL, vector_width=DIM, seed=1, dense_width=width)
    return Scorer.from_release(network.state_dict(), manifest)


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


def test_a_release_that_knew_of_no_searches_is_served_as_one_that_was_not_taught_them() -> None:
    older = CONFIG | {"features": {name: value for name, value in CONFIG["features"].items() if name != "queries"}}
    items = ItemRows.of(["i1", "i2", "i3"], VECTORS, DIM)
    assert not scorer_of(older).reads_queries and scorer_of(SEARCHING).reads_queries
    np.testing.assert_array_equal(scorer_of(older).score(items, 2), scorer_of().score(items, 2))


@pytest.mark.parametrize("taken", [0, 2, 5])
def test_a_search_is_the_newest_of_the_history_beside_as_many_takes_as_without(taken: int) -> None:
    scorer = scorer_of(SEARCHING)
    plain = ItemRows.of(["i1", "i2", *(f"i{n}" for n in range(3, 3 + taken))], VECTORS, DIM)
    items = plain.with_row("the search", unit_vector(99))
    assert list(items.item_ids) == [*plain.item_ids, "the search"] and items.has_vector_U.tolist()[-1] is True
    np.testing.assert_array_equal(items.vectors_UV[-1], unit_vector(99))
    np.testing.assert_array_equal(items.hashes_U2, ItemRows.of(items.item_ids, {}, DIM).hashes_U2)
    np.testing.assert_array_equal(items.vectors_UV[:-1], plain.vectors_UV)
    known = RequestMoment.unknown(TAUGHT, items, taken)
    batch = scorer.prepare(items, 2, replace(known, has_query=True, query_text="a word"))
    newest = [*range(2 + taken, 2, -1)][:3] or [0]
    assert batch.history_BL.tolist() == [[3 + taken, *newest]]
    without = scorer.prepare(plain, 2, RequestMoment.unknown(TAUGHT, plain, taken))
    assert without.history_BL.tolist() == [newest]
    np.testing.assert_array_equal(scorer.features_of(batch), scorer.features_of(without))
    assert batch.dense_BF[:, -4:].tolist() == [[1, 0, 0, 0]] * 2 and not without.dense_BF[:, -4:].any()
    assert not np.allclose(scorer.probabilities(batch), scorer.probabilities(without))
