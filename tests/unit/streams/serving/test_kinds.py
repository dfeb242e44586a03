"""Answers of a release that tells kinds of takes apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.scoring import ScoreResponse
from streams.serving.config import ServeConfig
from tests.factories.serving import Bench, Open, PlainScorer, open_bench

__all__ = ["open_bench"]

ASKED = {"user_id": "ann", "item_ids": ["lamp", "shoe", "nan"]}


class Falling(PlainScorer):
    """Of each item a cart is half as probable as a take, and a purchase a tenth."""

    kinds = ("cart", "purchase")

    def probabilities(self, batch: Any) -> NDArray[np.float64]:
        return super().probabilities(batch) * np.array([1, 0.5, 0.1])


async def serving(open_bench: Open, scorer: PlainScorer, **config: Any) -> Bench:
    bench = await open_bench(**config)
    await bench.serve(1, 0.0)
    assert bench.service.models.current is not None
    object.__setattr__(bench.service.models.current, "scorer", scorer)
    return bench


async def test_each_kind_has_its_probability_and_a_score_combines_them_by_weight(open_bench: Open) -> None:
    weights = {"click": 1, "cart": 2, "purchase": 30}
    bench = await serving(open_bench, Falling(0.0), kind_weights=weights)
    _, answer = await bench.post("/v1/score", ASKED)
    *scores, unknown = answer["scores"]
    for one in scores:
        take = one["probability"]
        assert one["kinds"] == {"cart": pytest.approx(take / 2), "purchase": pytest.approx(take / 10)}
        assert one["score"] == pytest.approx(take * (1 + 2 / 2 + 30 / 10))
    assert unknown["probability"] is unknown["score"] is None and unknown["kinds"] == {"cart": None, "purchase": None}
    assert ScoreResponse.model_validate(answer).model_dump(mode="json", exclude_unset=True) == answer
    assert "kinds_missing" not in answer
    status, none = await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["boot"], "exclude_taken": True})
    assert status == 200 and none["scores"] == [] and none["left_out"] == ["boot"]


async def test_a_weight_of_a_kind_that_the_release_does_not_tell_apart_is_named(open_bench: Open) -> None:
    bench = await serving(open_bench, PlainScorer(0.0), kind_weights={"click": 2, "purchase": 9})
    _, answer = await bench.post("/v1/score", ASKED)
    assert answer["kinds_missing"] == ["purchase"] and "kinds" not in answer["scores"][0]
    assert answer["scores"][0]["score"] == pytest.approx(2 * answer["scores"][0]["probability"])


async def test_an_answer_without_kinds_and_weights_has_neither(open_bench: Open) -> None:
    bench = await serving(open_bench, PlainScorer(0.0))
    _, answer = await bench.post("/v1/score", ASKED)
    assert set(answer["scores"][0]) == {"item_id", "probability", "has_vector"} and "kinds_missing" not in answer


@pytest.mark.parametrize("wrong", [{"view": 1}, {"cart": float("nan")}, {"cart": "many"}])
def test_weights_of_other_kinds_and_weights_that_are_no_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="kind_weights"):
        ServeConfig.model_validate({"kind_weights": wrong})
