from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from schemas.errors import Misconfigured
from tests.factories.releases import make_manifest
from tests.factories.samples import DIM, SMALL_MODEL, make_catalogue, unit_vector
from trainer.features.config import FeatureConfig
from trainer.features.probe import probe
from trainer.features.state import FeatureState
from trainer.networks.ciubm import DENSE_FEATURES, CiUBM, CtrBatch, by_length
from trainer.networks.collate import collate
from trainer.networks.config import CiUBMConfig, LearnerConfig
from trainer.networks.item_rows import ItemRows
from trainer.networks.learner import Learner
from trainer.networks.losses import NonFiniteLoss
from trainer.networks.scorer import RequestMoment, Scorer
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression

CONFIGS = pytest.mark.parametrize("config", [SMALL_MODEL, SMALL_MODEL.without_content()], ids=["ciubm", "din"])


def row(item: int, history: tuple[int, ...] = (), *, label: int = 0) -> Impression:
    return Impression("e", 0, 0, 0, "u", item, history, (0,) * len(history), False, False, label)


def batch_of(rows: list[Impression], known: Catalogue | None = None, *, length: int = 5) -> CtrBatch:
    return collate(rows, None, known or make_catalogue(20), history_length=length).batch


def model(config: CiUBMConfig = SMALL_MODEL, seed: int = 3) -> CiUBM:
    network = CiUBM(config, vector_width=DIM, seed=seed)
    network.id_table.admit(torch.from_numpy(make_catalogue(20).hashes(np.arange(20))))
    with torch.no_grad():  # the table starts small and its rows equal; make ids matter
        torch.nn.init.normal_(network.id_table.embedding.weight, std=0.05)
        network.id_table.embedding.weight.mul_(20)
    return network.eval()


@CONFIGS
def test_padding_changes_nothing(config: CiUBMConfig) -> None:
    network = model(config)
    rows = [row(4, (1, 2)), row(5, ())]
    alone = [float(network(batch_of([each])).detach()) for each in rows]
    padded = network(batch_of([*rows, row(6, (1, 2, 3, 4, 5))]))[:2]
    np.testing.assert_allclose(padded.detach().numpy(), alone, atol=1e-5)


@CONFIGS
@pytest.mark.parametrize("history", [(1, 2, 3), ()], ids=["history", "none"])
def test_one_history_for_all_rows_scores_as_one_for_each(config: CiUBMConfig, history: tuple[int, ...]) -> None:
    network = model(config)
    batch = batch_of([row(target, history) for target in (4, 5, 2)])
    shared = replace(batch, history_BL=batch.history_BL[:1])
    with torch.no_grad():
        np.testing.assert_allclose(network(shared).numpy(), network(batch).numpy(), atol=1e-5)


def head_input(network: CiUBM, batch: CtrBatch) -> torch.Tensor:
    """What the last layers see of the first row."""
    seen: list[torch.Tensor] = []
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(batch)
    return seen[0][0].detach()


def test_interests_match_plain_loops() -> None:
    known, network = make_catalogue(20), model()
    history, target = (3, 1, 2), 4  # oldest first
    batch = batch_of([row(target, history)], known)
    features = head_input(network, batch)
    category = network.category_table.weight[0].detach().numpy()  # of items without one

    def content(item: int) -> np.ndarray:
        projected = network.projection(torch.from_numpy(known.vectors(np.array([item]))))[0].detach().numpy()
        return projected / np.linalg.norm(projected)

    def identity(item: int) -> np.ndarray:
        return network.id_table(torch.from_numpy(known.hashes(np.array([item]))))[0].detach().numpy() + category

    newest_first = history[::-1]
    similarity = [float(content(item) @ content(target)) for item in newest_first]
    raw = [float(unit_vector(item) @ unit_vector(target)) for item in newest_first]
    scale = len(history) ** -0.5
    unit = network.attention
    attended = []
    for item, s, r in zip(newest_first, similarity, raw, strict=True):
        e, t = identity(item), identity(target)
        given = np.concatenate([e, t, e - t, e * t, [s, r]]).astype(np.float32)
        weight = float(unit.second(unit.activation(unit.first(torch.from_numpy(given)))).detach())
        attended.append(weight * scale * np.concatenate([e, content(item)]))
    fusion = sum(s * identity(item) for s, item in zip(similarity, newest_first, strict=True)) * scale

    def summaries(values: list[float]) -> list[float]:
        tiers = [0] * SMALL_MODEL.similarity_bins
        for value in values:
            tiers[min(int((value + 1) / 2 * SMALL_MODEL.similarity_bins), SMALL_MODEL.similarity_bins - 1)] += 1
        weights = [2 ** (-n / SMALL_MODEL.recency_half_life_items) for n in range(len(values))]
        recent = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        four = [max(values), sum(values) / len(values), recent, values[0]]
        return [*np.log1p(tiers), *(3 * np.array(four))]

    interests = [sum(attended), fusion]
    counted = [summaries(similarity), summaries(raw)]
    dense = network.numeric(batch.dense_BF)[0].detach().numpy()
    expected = np.concatenate([identity(target), dense, *interests, *counted, content(target)])
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_din_form_does_not_look_at_vectors_and_the_full_one_does() -> None:
    rows = [row(4, (1, 2, 3))]
    one, other = batch_of(rows), batch_of(rows)
    other = replace(other, vectors_UV=other.vectors_UV.roll(1, dims=1))
    din, full = model(SMALL_MODEL.without_content()), model()
    assert torch.equal(din(one), din(other))
    assert not torch.allclose(full(one), full(other))


def test_item_without_a_vector_adds_no_similarity() -> None:
    known = make_catalogue(20)
    known.delete_item("i2")
    features = head_input(model(), batch_of([row(4, (1, 2))], known))
    start = SMALL_MODEL.id_width * 3 + SMALL_MODEL.numeric_width * DENSE_FEATURES + SMALL_MODEL.content_width
    histogram = features[start : start + SMALL_MODEL.similarity_bins]
    assert float(histogram.sum()) == pytest.approx(np.log(2))  # one pair, not two


PARTS = [
    *("id_interest", "content_interest", "fusion_interest", "similarity_features", "raw_similarities"),
    *("target_content", "target_id", "content_in_attention"),
]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_switched_off(part: str) -> None:
    network = model(SMALL_MODEL.model_copy(update={part: False}))
    assert torch.isfinite(network(batch_of([row(4, (1, 2)), row(5)]))).all()


def test_same_seed_same_weights_and_global_randomness_untouched() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (CiUBM(SMALL_MODEL, vector_width=DIM, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["projection.weight"], other["projection.weight"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_step_scores_before_it_learns_and_then_learns() -> None:
    learner = Learner(SMALL_MODEL, LearnerConfig(learning_rate=0.01), vector_width=DIM, seed=1)
    rows = [row(n % 20 + 1, (n % 7 + 1, n % 5 + 1), label=n % 2) for n in range(32)]
    collated = collate(rows, None, make_catalogue(20), history_length=5)
    untouched = torch.sigmoid(learner.model(collated.batch).double()).detach().numpy()
    first = learner.step(collated.batch, collated.labels_B, None)
    np.testing.assert_allclose(first.probabilities_B, untouched)
    for _ in range(60):
        last = learner.step(collated.batch, collated.labels_B, None)
    assert last.loss < 0.5 * first.loss


def test_loss_that_is_no_number_changes_nothing() -> None:
    learner = Learner(SMALL_MODEL, LearnerConfig(), vector_width=DIM, seed=1)
    collated = collate([row(1, (2,)), row(3, (4,), label=1)], None, make_catalogue(20), history_length=5)
    broken = replace(collated.batch, vectors_UV=collated.batch.vectors_UV * torch.nan)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="2 rows"):
        learner.step(broken, collated.labels_B, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.model.state_dict().items())


VECTORS = {f"i{n}": unit_vector(n) for n in range(1, 21)}
RELEASE_CONFIG = {
    "model": SMALL_MODEL.model_dump(mode="json"),
    "features": FeatureConfig().model_dump(mode="json"),
    "history_length": 5,
}
MANIFEST = make_manifest(1).model_copy(update={"config": RELEASE_CONFIG})


def test_scorer_answers_what_training_would_have_predicted() -> None:
    known, network = make_catalogue(20), model()
    history = (6, 5, 4, 3, 2, 1)
    rows = [row(item, history[-5:]) for item in (7, 2, 9)]
    expected = torch.sigmoid(network(batch_of(rows, known)).double()).detach().numpy()
    scorer = Scorer.from_release(network.state_dict(), MANIFEST)
    asked = (7, 2, 9, *history)
    items = ItemRows.of([f"i{n}" for n in asked], VECTORS, DIM)
    found = scorer.score(items, 3, moment_of(known, asked, [0] * len(history)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def moment_of(known: Catalogue, asked: tuple[int, ...], seconds: list[int]) -> RequestMoment:
    return RequestMoment(FeatureState(FeatureConfig(), known).states(np.array([0, *asked])), seconds, 0)


def test_a_user_without_history_is_scored_as_in_training() -> None:
    known, network = make_catalogue(20), model()
    expected = torch.sigmoid(network(batch_of([row(7, ()), row(2, ())], known)).double()).detach().numpy()
    items = ItemRows.of(["i7", "i2"], VECTORS, DIM)
    scorer = Scorer.from_release(network.state_dict(), MANIFEST)
    found = scorer.score(items, 2, moment_of(known, (7, 2), []))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_released_model_drops_nothing_whatever_it_dropped_in_training() -> None:
    config = SMALL_MODEL.model_copy(update={"dropout": 0.5, "id_dropout": 0.5})
    manifest = MANIFEST.model_copy(update={"config": RELEASE_CONFIG | {"model": config.model_dump(mode="json")}})
    scorer = Scorer.from_release(CiUBM(config, vector_width=DIM, seed=1).state_dict(), manifest)
    items = ItemRows.of(["i7", "i2", "i3", "i4"], VECTORS, DIM)
    np.testing.assert_array_equal(scorer.score(items, 2), scorer.score(items, 2))


def test_items_of_a_request_have_their_own_row_each_and_say_which_have_no_vector() -> None:
    rows = ItemRows.of(["i7", "none", "i2", "other", "none", "i7"], VECTORS, DIM)
    assert rows.found == 3 and rows.without_vector() == ["none", "other"]
    assert rows.has_vector_U.tolist() == [False, True, False, True, False, False, True]
    np.testing.assert_array_equal(rows.vectors_UV[[1, 3, 6]], [VECTORS["i7"], VECTORS["i2"], VECTORS["i7"]])
    assert not rows.vectors_UV[[0, 2, 4, 5]].any() and not rows.hashes_U2[0].any()
    known = rows.by_item()
    assert known.keys() == {"i7", "i2"} and all(np.array_equal(known[name], VECTORS[name]) for name in known)


def test_a_release_of_other_features_than_this_code_computes_says_so() -> None:
    network = model()
    manifest = MANIFEST.model_copy(update={"features": "0123456789abcdef"})
    with pytest.raises(Misconfigured, match="reads features 0123456789abcdef"):
        Scorer.from_release(network.state_dict(), manifest)
    values = probe(FeatureConfig.model_validate(RELEASE_CONFIG["features"]))
    Scorer.from_release(network.state_dict(), MANIFEST.model_copy(update={"feature_probe": values}))
    values[3] += 0.1
    with pytest.raises(Misconfigured, match=r"has otherwise \(takes\)"):
        Scorer.from_release(network.state_dict(), MANIFEST.model_copy(update={"feature_probe": values}))


def test_scorer_of_foreign_weights_says_so() -> None:
    with pytest.raises(Misconfigured, match="r000001"):
        Scorer.from_release(model(SMALL_MODEL.without_content()).state_dict(), MANIFEST)


@CONFIGS
def test_rows_of_many_lengths_score_as_each_alone_and_teach_the_same(config: CiUBMConfig) -> None:
    lengths = [0, 4, 1, 0, 2, 5, 0, 1, 3, 0, 1, 2]
    rows = [row(1 + n, tuple(1 + (n + k) % 19 for k in range(length))) for n, length in enumerate(lengths)]
    network, batch = model(config), batch_of(rows)
    pieces = by_length(batch.history_BL, batch.target_B)
    assert [tuple(history_BL.shape) for _, history_BL, _ in pieces] == [(4, 1), (4, 2), (4, 5)]
    logits = network(batch)
    torch.testing.assert_close(network.numbers(batch), network.network(batch)[1])
    alone = torch.stack([network(batch_of([each])).squeeze() for each in rows])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
    (logits * torch.arange(12.0)).sum().backward()
    gradients = {
        name: weight.grad.to_dense().clone() for name, weight in network.named_parameters() if weight.grad is not None
    }
    network.zero_grad()
    (alone * torch.arange(12.0)).sum().backward()
    for name, weight in network.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad.to_dense(), atol=1e-4, rtol=1e-4)


def test_histories_of_like_length_stay_one_piece() -> None:
    history_BL, target_B = torch.ones(12, 4, dtype=torch.int64), torch.arange(12)
    assert [rows for rows, *_ in by_length(history_BL, target_B)] == [None]
    assert [rows for rows, *_ in by_length(history_BL[:1], target_B)] == [None]
