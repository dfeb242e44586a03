"""Boosted trees beside the network: what is fitted, when, and that the whole form says what LightGBM's trees say."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
import pytest
import torch

from tests.factories.feeding import through_bytes
from trainer.networks.config import TreesConfig
from trainer.networks.trees import _PARAMETERS, BoostedTrees, Forest, TreeShare, TreeWindow, fit_trees

WIDTH = 6


def rows(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, of which some have few values, and labels that follow a threshold and a product."""
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(count, WIDTH)).astype(np.float32)
    numbers[:, 5] = np.round(numbers[:, 5] * 3) / 3
    logit = 2.0 * (numbers[:, 0] > 0.3) + 1.5 * (numbers[:, 1] * numbers[:, 2] > 0) + numbers[:, 5] - 1.5
    return numbers, (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32)


def loaded(config: TreesConfig, forest: Forest) -> BoostedTrees:
    trees = BoostedTrees(config.count, config.depth)
    trees.load(forest, config.share)
    return trees


@pytest.mark.parametrize("shape", [{}, {"depth": 3, "leaves": 8}, {"depth": 1, "leaves": 2}, {"depth": 7, "leaves": 5}])
def test_whole_trees_say_what_the_library_says_at_its_thresholds_too(shape: dict[str, Any]) -> None:
    config = TreesConfig(count=20, leaf_rows=20, **shape)
    numbers, label = rows(4_000)
    forest = fit_trees(config, numbers, label, seed=3)
    assert forest is not None
    parameters = _PARAMETERS | {
        "num_leaves": config.leaves, "max_depth": config.depth, "min_data_in_leaf": 20,
        "learning_rate": config.learning_rate, "seed": 3,
    }  # fmt: skip
    rows_of_all = lightgbm.Dataset(numbers, label, params=parameters)
    booster = lightgbm.train(parameters, rows_of_all, num_boost_round=len(forest.value_TL))
    # what the library splits zero from others by, 1e-35, is no number that a feature has
    thresholds = np.resize(forest.threshold_TN[np.abs(forest.threshold_TN) > 1e-30], (200, WIDTH))
    for asked in (numbers, thresholds, np.nextafter(thresholds, np.float32(np.inf))):
        found = loaded(config, forest)(torch.from_numpy(asked)).numpy()
        np.testing.assert_allclose(found, booster.predict(asked, raw_score=True), atol=1e-5)


def test_the_newest_rows_say_how_many_trees_are_kept() -> None:
    config = TreesConfig(count=60, leaf_rows=20)
    numbers, label = rows(4_000)
    many = fit_trees(config, numbers, label, seed=0)
    noise = label.copy()
    noise[:3_400] = np.random.default_rng(1).permutation(label[:3_400])
    few = fit_trees(config, numbers, noise, seed=0)
    assert many is not None and few is not None
    assert len(few.value_TL) < 10 < len(many.value_TL)


@pytest.mark.parametrize("shape", [{}, {"learning_rate": 0.2}, {"leaf_rows": 150}, {"leaves": 3}, {"count": 7}])
def test_as_many_trees_are_kept_as_are_best_on_the_newest_rows_for_those_fitted_to_half_of_the_older(
    shape: dict[str, Any],
) -> None:
    config = TreesConfig(**{"count": 80, "leaf_rows": 20} | shape)
    numbers, label = rows(2_000)
    parameters = _PARAMETERS | {
        "num_leaves": config.leaves, "max_depth": config.depth, "min_data_in_leaf": config.leaf_rows,
        "learning_rate": config.learning_rate, "seed": 3,
    }  # fmt: skip
    everything = lightgbm.Dataset(numbers, label, params=parameters).construct()
    older = everything.subset(np.sort(np.random.default_rng(3).permutation(1_700)[:850]))
    newest, fewer = everything.subset(np.arange(1_700, 2_000)), {"min_data_in_leaf": -(-config.leaf_rows // 2)}
    trial = lightgbm.train(
        parameters | fewer, older, config.count, valid_sets=[newest],
        callbacks=[lightgbm.early_stopping(15, verbose=False)],
    )  # fmt: skip
    best = trial.best_iteration
    forest = fit_trees(config, numbers, label, seed=3)
    assert forest is not None and len(forest.value_TL) == best
    whole = lightgbm.train(parameters, lightgbm.Dataset(numbers, label, params=parameters), best)
    found = loaded(config, forest)(torch.from_numpy(numbers)).numpy()
    np.testing.assert_allclose(found, whole.predict(numbers, raw_score=True), atol=1e-5)


def test_each_tree_sees_a_share_of_the_rows_that_the_seed_draws() -> None:
    numbers, label = rows(2_000)
    config = TreesConfig(count=5, leaf_rows=20)
    first, second, again = (fit_trees(config, numbers[:, :1], label, seed=seed) for seed in (1, 2, 1))
    assert first is not None and second is not None and again is not None
    assert first.value_TL.tobytes() == again.value_TL.tobytes() != second.value_TL.tobytes()


def test_a_tree_of_which_a_leaf_says_nothing_is_not_trimmed() -> None:
    trees = BoostedTrees(3, 1)
    values = np.array([[0.0, 1.5], [0.0, 0.0]], np.float32)
    trees.load(Forest(np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float32), values), 0.5)
    read = torch.tensor([[-1.0], [1.0]])
    assert trees.trimmed()(read).tolist() == trees(read).tolist() == [0.0, 1.5]
    assert len(trees.trimmed().value_TL) == 1 and trees.trimmed().fitted


def test_rows_count_by_their_weight() -> None:
    config = TreesConfig(count=10, leaf_rows=20)
    numbers, label = rows(4_000)
    half, opposite = label.copy(), np.arange(4_000) % 2 == 0
    half[opposite] = 1 - half[opposite]
    weighed = fit_trees(config, numbers, half, np.where(opposite, 1e-6, 1).astype(np.float32), seed=0)
    assert weighed is not None
    logit = loaded(config, weighed)(torch.from_numpy(numbers)).numpy()
    assert logit[label == 1].mean() - logit[label == 0].mean() > 0.3


@pytest.mark.parametrize("part", [slice(0, 3_400), slice(3_400, None)])
def test_there_are_no_trees_where_old_or_new_rows_have_one_label(part: slice) -> None:
    numbers, label = rows(4_000)
    label[part] = 0
    assert fit_trees(TreesConfig(), numbers, label, seed=0) is None


def test_logits_are_the_networks_before_the_first_fit_and_a_weighted_mean_after_it() -> None:
    config = TreesConfig(count=4, leaf_rows=20, share=0.25)
    numbers, label = rows(1_000)
    logits, read = torch.linspace(-1, 1, 1_000), torch.from_numpy(numbers)
    trees = BoostedTrees(config.count, config.depth)
    assert torch.equal(trees.mixed(logits, read), logits) and not trees.fitted
    forest = fit_trees(config, numbers, label, seed=0)
    assert forest is not None
    trees.load(forest, config.share)
    torch.testing.assert_close(trees.mixed(logits, read), 0.75 * logits + 0.25 * trees(read))
    torch.testing.assert_close(trees.trimmed()(read), trees(read))


def test_new_trees_leave_nothing_of_those_before_and_travel_as_weights_do() -> None:
    config = TreesConfig(count=30, leaf_rows=20)
    numbers, label = rows(4_000)
    first, second = (fit_trees(config.model_copy(update={"count": n}), numbers, label, seed=0) for n in (30, 2))
    assert first is not None and second is not None
    trees = loaded(config, first)
    trees.load(second, config.share)
    other = BoostedTrees(config.count, config.depth)
    other.load_state_dict(trees.state_dict())
    read = torch.from_numpy(numbers)
    assert torch.equal(other(read), trees(read)) and torch.equal(trees(read), loaded(config, second)(read))
    assert len(trees.trimmed().value_TL) == 2


def test_a_first_fit_beyond_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="first_rows is 20000, more than the 10000 rows that are kept: lower it"):
        TreesConfig(rows=10_000)


class TestShare:
    """What trees weigh in a stream."""

    def judged(self, best: float, share: TreeShare, rows: int, seed: int = 0) -> float:
        """The weight after rows whose labels follow a mixture of two logits."""
        random = torch.Generator().manual_seed(seed)
        logits, trees = torch.randn(2, rows, generator=random) * 3
        labels = (torch.rand(rows, generator=random) < torch.sigmoid(torch.lerp(logits, trees, best))).float()
        return [
            float(share.judge(*part, None))
            for part in zip(*(a.split(256) for a in (logits, trees, labels)), strict=True)
        ][-1]

    @pytest.mark.parametrize("best", [0.0, 0.1, 0.3, 0.5, 1.0])
    def test_it_is_what_would_have_served_best_up_to_the_most(self, best: float) -> None:
        assert self.judged(best, TreeShare(0.5), 20_000) == pytest.approx(min(best, 0.5))

    def test_what_was_best_long_ago_no_longer_counts(self) -> None:
        share = TreeShare(0.5)
        assert self.judged(0.5, share, 12_000) == 0.5
        assert self.judged(0.0, share, 2_000) == pytest.approx(0.5, abs=0.2)
        assert self.judged(0.0, share, 32_000) == 0.0

    def test_rows_count_by_their_weight(self) -> None:
        logits, labels = torch.tensor([4.0, -4.0]), torch.tensor([1.0, 1.0])
        for weights, expected in (([1.0, 0.0], 0.0), ([0.0, 1.0], 0.5)):
            assert float(TreeShare(0.5).judge(logits, -logits, labels, torch.tensor(weights))) == expected

    def test_one_that_was_stored_goes_on(self) -> None:
        share, other = TreeShare(0.5), TreeShare(0.5)
        self.judged(0.5, share, 5_000)
        other.restore(share.snapshot())
        assert self.judged(0.2, share, 5_000, seed=1) == self.judged(0.2, other, 5_000, seed=1)
        assert share.snapshot() == other.snapshot()


class TestWindow:
    config = TreesConfig(count=5, depth=2, leaves=4, leaf_rows=5, rows=300, first_rows=100)

    def fits(self, window: TreeWindow, begin: int, end: int, step: int = 20) -> dict[int, Forest]:
        numbers, label = rows(2_000)
        found = {}
        for start in range(begin, end, step):
            window.add(numbers[start : start + step], label[start : start + step], None)
            forest = window.fit_if_due()
            if forest is not None:
                found[start + step] = forest
        return found

    def test_fits_follow_the_rows_and_read_the_newest_in_order(self) -> None:
        found = self.fits(TreeWindow(self.config, WIDTH, seed=0), 0, 1_500)
        assert list(found) == [100, 300, 900, 1_500]
        numbers, label = rows(2_000)
        for end, forest in found.items():
            part = slice(max(0, end - 300), end)
            again = fit_trees(self.config, numbers[part], label[part], seed=0)
            assert again is not None
            np.testing.assert_array_equal(forest.value_TL, again.value_TL)
            np.testing.assert_array_equal(forest.threshold_TN, again.threshold_TN)

    def test_fits_that_were_due_are_counted_by_whether_the_rows_had_both_labels(self) -> None:
        numbers, label = rows(2_000)
        window = TreeWindow(self.config, WIDTH, seed=0)
        for start in range(0, 1_000, 20):
            taken = label[start : start + 20] if start >= 300 else np.zeros(20, np.float32)
            window.add(numbers[start : start + 20], taken, None)
            window.fit_if_due()
            assert (window.fits, window.fits_missed) == (start >= 880, (start >= 80) + (start >= 280))

    def test_the_next_fit_waits_for_twice_as_many_rows_as_the_last_one_had(self) -> None:
        assert list(self.fits(TreeWindow(self.config, WIDTH, seed=0), 0, 1_470, 70)) == [140, 420, 1_050]
        short = self.config.model_copy(update={"rows": 80, "first_rows": 80})
        assert list(self.fits(TreeWindow(short, WIDTH, seed=0), 0, 400)) == [80, 240, 400]

    def test_a_fit_counts_rows_by_their_weight_and_draws_by_the_seed_of_its_window(self) -> None:
        numbers, label = rows(200)
        weight = np.where(np.arange(200) % 3, 1, 0.125).astype(np.float32)
        window = TreeWindow(self.config, WIDTH, seed=7)
        window.add(numbers, label, weight)
        found = window.fit_if_due()
        expected, unweighted, other = (
            fit_trees(self.config, numbers, label, weights, seed=seed)
            for weights, seed in ((weight, 7), (None, 7), (weight, 0))
        )
        assert found is not None and expected is not None and unweighted is not None and other is not None
        assert found.value_TL.tobytes() == expected.value_TL.tobytes()
        assert found.value_TL.tobytes() not in (unweighted.value_TL.tobytes(), other.value_TL.tobytes())

    @pytest.mark.parametrize("cut", [60, 240, 560])
    def test_a_window_that_was_stored_goes_on_as_it_would_have(self, cut: int) -> None:
        window, other = TreeWindow(self.config, WIDTH, seed=4), TreeWindow(self.config, WIDTH, seed=1)
        self.fits(window, 0, cut)
        other.restore(through_bytes(window.snapshot()))
        expected, found = self.fits(window, cut, 1_500), self.fits(other, cut, 1_500)
        assert list(found) == list(expected) and len(found) > 1
        for end, forest in found.items():
            np.testing.assert_array_equal(forest.value_TL, expected[end].value_TL)

    def test_what_changed_since_a_snapshot_is_in_the_next_one(self) -> None:
        window = TreeWindow(self.config, WIDTH, seed=0)
        self.fits(window, 0, 400)
        before = window.snapshot().frozen()
        self.fits(window, 400, 420)
        copy = window.snapshot().frozen({"rows.": before.copies["rows."].held}).copies["rows."]
        assert set(range(100, 120)) <= set(copy.numbers.tolist()) and len(copy.numbers) < 60

    def test_rows_of_no_weight_are_not_fitted_on(self) -> None:
        numbers, label = rows(200)
        window, other = (
            TreeWindow(self.config.model_copy(update={"first_rows": n}), WIDTH, seed=0) for n in (200, 100)
        )
        weight = (np.arange(200) % 2).astype(np.float32)
        window.add(numbers, np.where(weight, label, 1 - label), weight)
        other.add(numbers[1::2], label[1::2], None)
        found, expected = window.fit_if_due(), other.fit_if_due()
        assert found is not None and expected is not None
        np.testing.assert_array_equal(found.value_TL, expected.value_TL)

    @pytest.mark.parametrize("change", [{"rows": 200}, {"rows": 400}])
    def test_the_snapshot_of_another_window_is_refused(self, change: dict[str, int]) -> None:
        window = TreeWindow(self.config, WIDTH, seed=0)
        self.fits(window, 0, 360)
        with pytest.raises(ValueError, match="rows for trees"):
            TreeWindow(self.config.model_copy(update=change), WIDTH, seed=0).restore(through_bytes(window.snapshot()))
        with pytest.raises(ValueError, match="do not fit"):
            TreeWindow(self.config, WIDTH + 1, seed=0).restore(through_bytes(window.snapshot()))
