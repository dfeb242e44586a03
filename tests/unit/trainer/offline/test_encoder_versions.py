"""Vectors of encoders that see less than there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.features import ItemFeatures
from encoders.fusion_config import FusionConfig
from encoders.similarity import cosine
from tests.factories.csft import make_features
from tests.factories.offline_folders import read_protocol, write_stream
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.datasets.spans import Span
from trainer.offline import encoder_versions as module
from trainer.offline.encoder_report import frozen_vectors
from trainer.offline.encoder_versions import EncoderVersions, VectorKind, _without_sides, for_click_models, reduced
from trainer.offline.protocols import Protocol
from trainer.samples.numbering import FeatureNumbers


def make_items(n: int) -> ItemFeatures:
    has = np.arange(n) % 4
    features = np.ones((n, 3), np.float32)
    return ItemFeatures(
        text_NT=features * (has != 0)[:, None],
        image_NI=features * (has != 1)[:, None],
        has_text_N=has != 0,
        has_image_N=has != 1,
        category_N2=np.full((n, 2), -1),
        year_N=np.full(n, np.nan, np.float32),
        price_N=np.full(n, np.nan, np.float32),
        words_NA=np.full((n, 2), -1),
    )


@pytest.mark.parametrize(("kind", "share"), [("missing-10", 0.1), ("missing-30", 0.3), ("missing-70", 0.7)])
def test_of_a_share_of_the_items_with_both_modalities_one_is_missing(kind: VectorKind, share: float) -> None:
    items = make_items(4_000)
    left = _without_sides(items, kind, seed=3)
    both = items.has_text_N & items.has_image_N
    lost_text, lost_image = items.has_text_N & ~left.has_text_N, items.has_image_N & ~left.has_image_N
    assert np.mean((lost_text | lost_image)[both]) == pytest.approx(share, abs=0.03)
    assert np.mean(lost_text[both]) == pytest.approx(share / 2, abs=0.03)
    assert not (lost_text & lost_image).any() and not (lost_text | lost_image)[~both].any()
    assert np.array_equal(left.text_NT.any(axis=1), left.has_text_N)
    assert np.array_equal(left.image_NI.any(axis=1), left.has_image_N)
    assert not np.array_equal(_without_sides(items, kind, seed=4).has_text_N, left.has_text_N)
    assert np.array_equal(_without_sides(items, kind, seed=3).has_text_N, left.has_text_N)


@pytest.mark.parametrize(("kind", "sides"), [("csft", (3_000, 3_000)), ("text", (3_000, 0)), ("image", (0, 3_000))])
def test_of_one_modality_alone_nothing_of_the_other_is_left(kind: VectorKind, sides: tuple[int, int]) -> None:
    left = _without_sides(make_items(4_000), kind, seed=0)
    assert (left.has_text_N.sum(), left.has_image_N.sum()) == sides
    assert (left.text_NT.any(axis=1).sum(), left.image_NI.any(axis=1).sum()) == sides


def test_principal_components_are_those_of_the_rows_they_are_fitted_on() -> None:
    rng = np.random.default_rng(0)
    fitted_on = np.arange(40) % 2 == 0
    vectors = rng.normal(size=(40, 6)).astype(np.float32) * np.array([5, 5, 0.01, 0.01, 0.01, 0.01], np.float32)
    vectors[0] = 0
    other = vectors.copy()
    other[~fitted_on] = 50 * rng.normal(size=(20, 6))
    found, beside_other = reduced(vectors, fitted_on, 2), reduced(other, fitted_on, 2)
    assert np.allclose(found[fitted_on], beside_other[fitted_on], atol=1e-6)
    assert found.shape == (40, 2) and not found[0].any()
    assert np.allclose(np.linalg.norm(beside_other[1:], axis=1), 1)
    assert np.allclose(found[1:] @ found[1:].T, cosine(vectors[1:], vectors[1:]), atol=0.05), "the leading ones"


def test_as_many_components_as_there_are_columns_are_the_columns() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(reduced(vectors, np.ones(5, bool), 3), vectors)


def test_what_is_chosen_for_click_models_is_what_was_not_set() -> None:
    csft, shape = for_click_models(CsftConfig(), FusionConfig())
    assert (csft.log_q_strength, csft.temperature, csft.learn_temperature) == (0.0, 0.25, False)
    assert (shape.text_rank, shape.image_rank) == (384, 512)
    csft, shape = for_click_models(CsftConfig(temperature=0.1, epochs=9), FusionConfig(image_rank=64))
    assert (csft.log_q_strength, csft.temperature, csft.learn_temperature, csft.epochs) == (0.0, 0.1, False, 9)
    assert (shape.text_rank, shape.image_rank) == (384, 64)


# ---- versions of a folder --------------------------------------------------------------------------------------------

SHAPE = FusionConfig(width=8, nested_widths=(), hidden=8, text_rank=8, image_rank=8)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    folder: Path = write_stream(tmp_path_factory.mktemp("stream"), users=60, items=60, takes=1_500)
    return read_protocol(folder, "prequential")[0]


def versions_of(protocol: Protocol) -> EncoderVersions:
    """One item has neither a title nor a picture."""
    ids = protocol.log.data.item_ids
    numbers = FeatureNumbers(ids, [str(n) for n in range(len(ids))])
    csft, pretrain = CsftConfig(epochs=5, history_length=3), PretrainConfig(epochs=1, seed=99)
    return EncoderVersions(protocol, make_features(len(ids)), numbers, csft, SHAPE, pretrain)


Call = dict[str, Any]


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What each run is given; a run only moves a weight."""
    calls: list[Call] = []

    def learn(config, fusion, items, numbers, pairs, *, usable):  # type: ignore[no-untyped-def]
        calls.append({"config": config, "pairs": pairs, "usable": usable, "weights": fusion.text_head.bias.clone()})
        calls[-1]["all"] = torch.cat([p.detach().flatten().clone() for p in fusion.parameters()])
        with torch.no_grad():
            fusion.text_head.bias += 1

    monkeypatch.setattr(module, "learn", learn)
    return calls


def test_each_version_goes_on_from_the_one_before_with_all_that_happened_since(
    protocol: Protocol, learned: list[Call]
) -> None:
    versions, log, stops = versions_of(protocol), protocol.log, protocol.encoder_stops
    made = versions.vectors("csft", 7)
    assert [call["config"].seed for call in learned] == [7, 1_007, 2_007, 3_007]
    assert [call["config"].epochs for call in learned] == [5, 2, 2, 2]
    assert {call["config"].temperature for call in learned} == {0.25}
    pairs = log.pairs(Span(protocol.encode.start, stops[-1]), versions.numbers, history_length=3, seed=0)
    seconds = np.array([pair.row.second for pair in pairs])
    assert np.isin(stops[:-1], seconds).any(), "a pair of the second at which a version begins to serve"
    for call, stop, before in zip(learned, stops, range(4), strict=True):
        assert [pair.row.event_id for pair in call["pairs"]] == [
            pair.row.event_id for pair, second in zip(pairs, seconds, strict=True) if second < stop
        ]
        assert max(len(pair.row.history) for pair in call["pairs"]) == 3
        assert call["usable"].tolist() == (log.published(Span(0, stop)) & ~log.held_out).tolist()
        torch.testing.assert_close(call["weights"], learned[0]["weights"] + before)
    assert log.held_out.any() and not np.allclose(made.vectors_EIV[0], made.vectors_EIV[1])
    for seed in (7, 8):
        versions.vectors("csft", seed)
    same, other = (torch.equal(learned[call]["all"], learned[0]["all"]) for call in (4, 8))
    assert same and not other, "where a run begins depends on the seed"


def test_an_item_without_content_has_no_vector_in_any_version_shuffled_or_not(
    protocol: Protocol, learned: list[Call]
) -> None:
    versions = versions_of(protocol)
    made, shuffled, again = (
        versions.vectors(kind, seed) for kind, seed in (("csft", 0), ("shuffled", 0), ("shuffled", 1))
    )  # type: ignore[arg-type]
    for one in (made, shuffled, again):
        assert (
            one.vectors_EIV.shape == (4, len(protocol.log.data.item_ids) + 1, 8) and one.vectors_EIV.dtype == np.float32
        )
        assert np.array_equal(one.vectors_EIV.any(axis=2), one.has_vector_EI)
        assert (~one.has_vector_EI).sum(1).tolist() == [2] * 4 and not one.has_vector_EI[:, 0].any()
    assert not made.has_vector_EI[:, 39].any()
    assert not np.array_equal(shuffled.has_vector_EI, again.has_vector_EI), "drawn anew for each seed"
    rows = {tuple(row) for row in made.vectors_EIV[2].round(5).tolist()}
    assert {tuple(row) for row in shuffled.vectors_EIV[2].round(5).tolist()} == rows


def test_stale_vectors_are_of_the_first_version_alone(protocol: Protocol, learned: list[Call]) -> None:
    versions = versions_of(protocol)
    made, stale = versions.vectors("csft", 0), versions.vectors("stale", 0)
    assert len(learned) == 5 and len(learned[4]["pairs"]) == len(learned[0]["pairs"])
    assert all(np.array_equal(one, made.vectors_EIV[0]) for one in stale.vectors_EIV)


def test_without_behaviours_all_versions_are_of_what_was_published_before_the_first(
    protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, known = versions_of(protocol), protocol.log.published(Span(0, protocol.encoder_stops[0]))
    asked: list[tuple[int, int]] = []
    aligned = module.pretrain
    monkeypatch.setattr(
        module, "pretrain", lambda config, *more: asked.append((config.seed, len(more[1]))) or aligned(config, *more)
    )
    found = versions.vectors("pretrained", 3)
    assert asked == [(3, 1 + known.sum())] and known.sum() < len(known) - 1
    assert all(np.array_equal(one, found.vectors_EIV[0]) for one in found.vectors_EIV)
    frozen = versions.vectors("frozen", 3).vectors_EIV
    expected = reduced(frozen_vectors(versions.features, centred_by_N=known[1:]), known, 8)
    assert len(frozen) == 4 and all(np.allclose(one, expected, atol=1e-6) for one in frozen)
