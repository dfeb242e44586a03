"""What a step does to ids beyond the gradient."""

from __future__ import annotations

import numpy as np

from tests.factories.samples import DIM, SMALL_MODEL, make_catalogue
from trainer.networks.collate import collate
from trainer.networks.config import LearnerConfig
from trainer.networks.learner import Learner
from trainer.samples.rows import Impression


def test_an_id_that_gets_anothers_row_does_not_get_its_momentum() -> None:
    catalogue = make_catalogue(16)
    config = SMALL_MODEL.model_copy(update={"id_rows": 8, "id_admit_after": 1})
    learner = Learner(config, LearnerConfig(), vector_width=DIM, seed=0)

    def step(items: range) -> np.ndarray:
        """Learn from these items twice; the momentum of the rows of the table."""
        rows = [Impression("e", 0, n, 0, f"u{n}", n, (), (), False, False, n % 2) for n in items]
        collated = collate(rows, None, catalogue, history_length=5)
        for _ in range(2):
            learner.step(collated.batch, collated.labels_B, None)
        return np.abs(learner.snapshot().arrays["sparse/0/exp_avg"]).sum(1)[1:]

    assert (step(range(1, 9)) > 0).all()
    before = learner.model.id_table.key_SW.clone()
    collated = collate(
        [Impression("e", 0, n, 0, "u", n, (), (), False, False, 1) for n in range(9, 12)], None, catalogue,
        history_length=5,
    )  # fmt: skip
    learner.step(collated.batch, collated.labels_B, None)
    reassigned = (learner.model.id_table.key_SW != before).flatten().numpy()
    for name in ("exp_avg", "exp_avg_sq"):
        moments = np.abs(learner.snapshot().arrays[f"sparse/0/{name}"]).sum(1)[1:]
        assert reassigned.sum() == 3
        assert not moments[reassigned].any() and (moments[~reassigned] > 0).all()
