"""What a server computes is what the network would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories.samples import DIM, SMALL_MODEL
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.config import CiUBMConfig
from trainer.networks.inference import CompiledCiUBM
from trainer.networks.numeric import KNOTS
from trainer.networks.trees import Forest

FEATURES = 2 * len(KNOTS) + 3


def network(**changes: Any) -> CiUBM:
    """A network whose every weight matters."""
    config = CiUBMConfig(**(SMALL_MODEL.model_dump() | changes))
    made = CiUBM(config, vector_width=DIM, seed=1, dense_width=FEATURES)
    with torch.no_grad():
        for number, weight in enumerate(made.parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    if config.trees.count:
        made.trees.load(grown(made.numbers_width), 0.4)
    for _ in range(config.id_admit_after):
        made.id_table.admit(request(30, 20).hashes_U2[::2])
    return made.eval()


def grown(numbers: int) -> Forest:
    """Trees of random nodes; the second one says nothing."""
    random, inner = np.random.default_rng(5), 2**SMALL_MODEL.trees.depth - 1
    feature_TN = random.integers(0, numbers, (SMALL_MODEL.trees.count, inner))
    value_TL = random.normal(size=(SMALL_MODEL.trees.count, inner + 1)).astype(np.float32)
    value_TL[1] = 0
    return Forest(feature_TN, random.normal(size=feature_TN.shape).astype(np.float32), value_TL)


def request(candidates: int, history: int, *, held: float = 1.0) -> CtrBatch:
    """A request of one user; the numbers stand at every knot, just below it, between two, and beyond the last."""
    items, random = 1 + candidates + history, torch.Generator().manual_seed(7)
    has_U = torch.rand(items, generator=random) < held
    has_U[0] = False
    vectors_UV = torch.nn.functional.normalize(torch.randn(items, DIM, generator=random), dim=1) * has_U[:, None]
    hashes_U2 = torch.randint(1, 1 << 40, (items, 2), generator=random)
    hashes_U2[0] = 0
    numbers = torch.tensor([*KNOTS, *(knot - 0.01 for knot in KNOTS[1:]), -1e6, 1e6, 0.7, -2.5])
    return CtrBatch(
        hashes_U2=hashes_U2,
        vectors_UV=vectors_UV,
        has_vector_U=has_U,
        target_B=torch.arange(1, candidates + 1).flip(0),
        history_BL=torch.arange(items - 1, candidates, -1)[None] if history else torch.zeros(1, 1, dtype=torch.int64),
        dense_BF=torch.stack([numbers.roll(n) for n in range(candidates)]),
        category_U=torch.randint(0, 1 << 30, (items,), generator=random),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bilinear_interest": True},
        {"raw_similarities": False},
        {"content_in_attention": False},
        {"similarity_features": False, "target_content": False, "content_interest": False},
        {"fusion_interest": False, "id_interest": False, "target_id": False},
        {"numeric_width": 0, "cross_layers": 0},
        {"categories": 0, "refresh_projection": False},
        {"trees": {"count": 0}},
        {"kinds": ("purchase",)},
        {"kinds": ("cart", "purchase")},
        {name: getattr(SMALL_MODEL.without_content(), name) for name in type(SMALL_MODEL).model_fields},
    ],
    ids=lambda changes: ", ".join(changes)[:60] or "all parts",
)
def test_every_configuration_answers_as_the_network_does(changes: dict[str, Any]) -> None:
    made = network(**changes)
    compiled = CompiledCiUBM(made)
    for asked in (request(7, 5), request(30, 20), request(1, 1), request(4, 0), request(6, 9, held=0.5)):
        with torch.inference_mode():
            expected = made.probabilities(asked).numpy()
        np.testing.assert_allclose(compiled.probabilities(asked).numpy(), expected, atol=1e-6)
        assert len(expected) < 3 or expected.std() > 1e-3, "the comparison says nothing"


def test_a_request_without_any_vector_and_one_without_categories_are_answered_alike() -> None:
    made = network()
    for asked in (request(5, 4, held=0.0), replace(request(5, 4), category_U=torch.zeros(10, dtype=torch.int64))):
        with torch.inference_mode():
            expected = made.probabilities(asked).numpy()
        np.testing.assert_allclose(CompiledCiUBM(made).probabilities(asked).numpy(), expected, atol=1e-6)


def test_a_number_that_is_none_spoils_its_own_row_alone() -> None:
    asked = request(5, 4)
    asked.dense_BF[1, 3] = float("nan")
    found = CompiledCiUBM(network()).probabilities(asked)
    assert found.isnan().flatten().tolist() == [False, True, False, False, False]


def test_rows_of_several_users_are_refused() -> None:
    asked = request(2, 3)
    with pytest.raises(ValueError, match="2 histories"):
        CompiledCiUBM(network()).probabilities(replace(asked, history_BL=asked.history_BL.expand(2, -1)))
