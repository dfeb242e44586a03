"""A network that `mimstream train` accepts has no part that never learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.factories.samples import DAY0, DIM, SMALL_MODEL, make_catalogue, small_config
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.negatives.sampler import SpaceTimeSampler, TakeCounts
from trainer.networks.collate import Collated, collate
from trainer.networks.config import CiUBMConfig, LearnerConfig, TreesConfig
from trainer.networks.learner import Learner
from trainer.networks.trees import TreeShare
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression, Take

OTHER: Mapping[str, dict[str, Any]] = {
    "id_width": {"id_width": 6},
    "id_rows": {"id_rows": 8},
    "id_admit_after": {"id_admit_after": 3},
    "id_dropout": {"id_dropout": 0.5},
    "content_width": {"content_width": 5},
    "refresh_projection": {"refresh_projection": False},
    "hidden": {"hidden": (4, 4)},
    "attention_hidden": {"attention_hidden": 3},
    "similarity_bins": {"similarity_bins": 3},
    "id_interest": {"id_interest": False},
    "content_interest": {"content_interest": False},
    "fusion_interest": {"fusion_interest": False},
    "similarity_features": {"similarity_features": False},
    "raw_similarities": {"raw_similarities": False},
    "bilinear_interest": {"bilinear_interest": True},
    "target_id": {"target_id": False},
    "target_content": {"target_content": False},
    "content_in_attention": {"content_in_attention": False},
    "categories": {"categories": 0},
    "numeric_width": {"numeric_width": 0},
    "cross_layers": {"cross_layers": 0},
    "cross_rank": {"cross_rank": 3},
    "dropout": {"dropout": 0.5},
    "recency_half_life_items": {"recency_half_life_items": 1.0},
    "kinds": {"kinds": ("cart", "purchase")},
    "trees": {"trees": {"count": 0}},
}
"""Another value of each field, beside what it needs to count."""


TREES: Mapping[str, Any] = {
    "count": 1,
    "depth": 1,
    "leaves": 2,
    "leaf_rows": 8,
    "learning_rate": 0.5,
    "rows": 24,
    "first_rows": 48,
    "share": 0.1,
}
"""Another value of each field of the trees."""


def make_batch(catalogue: Catalogue, kinds: Sequence[str]) -> Collated:
    """Takes and exposures of users with histories of several lengths, against negatives."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(24):
        history = tuple(rng.integers(1, 20, n % 5).tolist())
        item, label = int(rng.integers(1, 20)), int(n % 3 == 0)
        rows.append(Impression("e", 0, n, DAY0 + n, f"u{n}", item, history, (0,) * len(history), False, False, label))
    memory = SpaceTimeMemory(window_seconds=100, window_takes=10, bank_takes=10, bank_seconds=1e6)
    for n in range(1, 20):
        memory.add(Take(DAY0 + n, "", n))
    plan = SpaceTimeSampler(space=8, time=8).plan(rows, memory, TakeCounts(1e6), catalogue, rng)
    return collate(rows, plan, catalogue, history_length=4, kinds=kinds)


def learned(model: CiUBMConfig) -> tuple[set[str], np.ndarray]:
    """Names of weights that never had a gradient in five steps, and the predictions of each."""
    batch = make_batch(make_catalogue(20), model.kinds)
    learner = Learner(model, LearnerConfig(), vector_width=DIM, seed=0)
    silent = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    predictions = []
    for _ in range(5):
        report = learner.step(batch.batch, batch.labels_B, batch.contrastive, kinds=batch.kinds)
        predictions.append(report.probabilities_B)
        for name, parameter in learner.model.named_parameters():
            if parameter.grad is not None and parameter.grad.to_dense().any():
                silent.discard(name)
    return silent, np.concatenate(predictions)


def test_every_field_of_the_network_is_tried() -> None:
    assert set(OTHER) == set(CiUBMConfig.model_fields) and set(TREES) == set(TreesConfig.model_fields)


@pytest.mark.parametrize("name", TREES)
def test_every_setting_of_the_trees_changes_predictions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeShare, "judge", lambda self, *_: self._shares_S[-1])  # what trees weigh is another test's
    usual = SMALL_MODEL.trees.model_dump()
    changed = SMALL_MODEL.model_copy(update={"trees": TreesConfig.model_validate(usual | {name: TREES[name]})})
    assert not np.array_equal(learned(changed)[1], learned(SMALL_MODEL)[1])


@pytest.mark.parametrize("name", OTHER)
def test_every_weight_of_an_accepted_network_learns_and_every_setting_changes_predictions(name: str) -> None:
    usual = SMALL_MODEL.model_copy(update={field: value for field, value in OTHER[name].items() if field != name})
    changed = small_config(model=SMALL_MODEL.model_dump() | OTHER[name]).model
    silent, found = learned(changed)
    assert silent == set()
    assert not np.array_equal(found, learned(usual)[1])
