"""Models on tabular features: what they read, and on which scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.factories.neural import world
from trainer.metrics import auc
from trainer.offline.data import CtrData
from trainer.offline.linear import Logistic
from trainer.offline.trees import DenseOnly, Trees

NAMES = ("takes", "category share", "age")


def taste(count: int = 400) -> CtrData:
    """Taken is what lies in the user's categories."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(count, 3)).astype(np.float32)
    labels = (numbers[:, 1] + 0.3 * rng.normal(size=count) > 0).astype(int).tolist()
    data = world([(n % 12 + 1, [1]) for n in range(count)], labels=labels, names=NAMES)
    return with_numbers(data, numbers)


def with_numbers(data: CtrData, numbers: Any) -> CtrData:
    return replace(data, rows=replace(data.rows, dense_NF=np.asarray(numbers, np.float32)))


def logistic(data: CtrData) -> Logistic:
    model = Logistic()
    model.fit(data, None, seed=0, trial={"c": 0.3})
    return model


def test_logistic_regression_is_of_standardised_numbers() -> None:
    data = taste()
    scores = logistic(data).predict(data)
    assert auc(data.rows.label_N.astype(np.int64), scores) > 0.9
    other = with_numbers(data, data.rows.dense_NF * [10, 0.01, 3] + [5, -7, 0])
    np.testing.assert_allclose(logistic(other).predict(other), scores, atol=1e-3)


def test_outliers_count_as_eight_deviations_and_a_constant_number_as_nothing() -> None:
    numbers = taste().rows.dense_NF.copy()
    numbers[:, 0] = 3.0
    data = with_numbers(taste(), numbers)
    model = logistic(data)
    scores = model.predict(data)
    assert np.isfinite(scores).all()
    mean, away = numbers[:, 1].mean(), numbers[:, 1].std()
    far, farther, near = numbers.copy(), numbers.copy(), numbers.copy()
    far[:, 1], farther[:, 1], near[:, 1] = mean + 8 * away, 1e6, mean + 7 * away
    found = [model.predict(with_numbers(data, one)) for one in (far, farther, near)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert (found[2] < found[0]).all()


def test_a_category_that_was_not_trained_on_is_none_and_the_others_are_told_apart() -> None:
    data = taste()
    by_category = replace(
        data, rows=replace(data.rows, label_N=(data.items.category_I[data.rows.item_N] == 2).astype(np.int8))
    )
    model = logistic(by_category)
    scores = model.predict(data)
    assert auc(by_category.rows.label_N.astype(np.int64), scores) > 0.99
    new = replace(data, items=replace(data.items, category_I=np.full_like(data.items.category_I, 77)))
    assert np.isfinite(model.predict(new)).all()


TRIAL = {"leaves": 4, "rounds": 20, "rate": 0.2, "leaf_rows": 10}


@pytest.mark.parametrize(("model", "reads"), [(Trees(), True), (DenseOnly(), False)], ids=["trees", "dense-only"])
def test_trees_read_all_numbers_and_dense_only_none_of_taste(model: Trees, reads: bool) -> None:
    data = taste()
    model.fit(data, None, seed=0, trial=TRIAL)
    numbers = data.rows.dense_NF.copy()
    numbers[:, 1] *= -1
    scores, turned = model.predict(data), model.predict(with_numbers(data, numbers))
    assert np.array_equal(scores, turned) is not reads and len(set(scores.tolist())) > 3
    assert (scores > 0).all() and (scores < 1).all()
    assert np.array_equal(model.predict(data), scores)


def test_trees_split_on_categories_and_repeat_themselves() -> None:
    data = taste()
    labels = np.isin(data.items.category_I[data.rows.item_N], [1, 3]).astype(np.int8)
    data = replace(data, rows=replace(data.rows, label_N=labels))
    one, other = Trees(), Trees()
    for model in (one, other):
        model.fit(data, None, seed=1, trial=TRIAL)
    assert auc(labels.astype(np.int64), one.predict(data)) > 0.99
    assert np.array_equal(one.predict(data), other.predict(data))


@pytest.mark.parametrize("change", [{"leaves": 3}, {"rounds": 15}, {"rate": 0.1}, {"leaf_rows": 60}, {"seed": 5}])
def test_every_number_of_a_trial_counts(change: dict[str, int]) -> None:
    data, found = taste(), []
    for settings in ({}, change):
        model, trial = Trees(), {"seed": 0, **TRIAL, **settings}
        model.fit(data, None, seed=int(trial.pop("seed")), trial=trial)
        found.append(model.predict(data))
    assert not np.array_equal(*found)


def test_a_regression_is_the_flatter_the_less_its_trial_allows() -> None:
    data, spreads = taste(), []
    for c in (1e-5, 0.3):
        model = Logistic()
        model.fit(data, None, seed=0, trial={"c": c})
        spreads.append(model.predict(data).std())
    assert spreads[0] < 0.01 < 0.1 < spreads[1]


def test_one_split_tells_any_categories_apart() -> None:
    data = taste(2_400)
    category = np.arange(len(data.items)) % 12
    labels = (category[data.rows.item_N] % 2).astype(np.int8)
    data = replace(data, items=replace(data.items, category_I=category), rows=replace(data.rows, label_N=labels))
    model = Trees()
    model.fit(data, None, seed=0, trial={"leaves": 2, "rounds": 5, "rate": 0.2, "leaf_rows": 10})
    assert auc(labels.astype(np.int64), model.predict(data)) > 0.99


def test_what_a_user_rates_is_not_among_time_and_popularity() -> None:
    names = ("user idle", "user's rating", "item idle")
    data = taste()
    data = replace(data, rows=replace(data.rows, dense_names=names))
    model = DenseOnly()
    model.fit(data, None, seed=0, trial=TRIAL)
    for place, reads in enumerate((True, False, True)):
        numbers = data.rows.dense_NF.copy()
        numbers[:, place] *= -1
        assert np.array_equal(model.predict(data), model.predict(with_numbers(data, numbers))) is not reads
