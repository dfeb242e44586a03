"""Vectors of searches beside those of items, from the encoders of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.features import ItemFeatures
from encoders.fusion_config import FusionConfig
from encoders.similarity import unit_or_zero_rows
from tests.factories.csft import make_features
from tests.factories.searching_folders import write_searching
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.csft.pairs import AnchorKind
from trainer.csft.run import padded
from trainer.datasets.folder import open_data_set
from trainer.datasets.queries import Queries
from trainer.datasets.spans import BehaviourLog
from trainer.offline import encoder_versions as module
from trainer.offline.encoder_versions import EncoderVersions, VectorKind
from trainer.offline.protocols import Protocol, protocol_of
from trainer.samples.numbering import FeatureNumbers

SHAPE = FusionConfig(width=8, nested_widths=(), hidden=8, text_rank=8, image_rank=8)
Call = dict[str, Any]


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    folder: Path = write_searching(tmp_path_factory.mktemp("here") / "set")
    return protocol_of(BehaviourLog.of(open_data_set(folder), folder), "time-split")


def versions_of(protocol: Protocol, *, queries: bool = True, **csft: Any) -> EncoderVersions:
    """Queries have the features of their own sides; nothing is known of the last one."""
    data = protocol.log.data
    found = Queries.of(data)
    ids = data.item_ids
    features = make_features(len(ids))
    if queries:
        contents = list(found.contents(data))
        text = np.array([bool(one.title) for one in contents]) & (np.arange(len(found)) < len(found) - 1)
        image = np.array([one.image is not None for one in contents]) & (np.arange(len(found)) < len(found) - 1)
        searched = make_features(len(found), groups=5, seed=9)
        searched = replace(
            searched,
            text_NT=np.random.default_rng(1).normal(size=searched.text_NT.shape).astype(np.float32) * text[:, None],
            image_NI=np.random.default_rng(2).normal(size=searched.image_NI.shape).astype(np.float32) * image[:, None],
            has_text_N=text,
            has_image_N=image,
            category_N2=np.full_like(searched.category_N2, -1),
        )
        features = ItemFeatures.concatenate([features, searched])
    numbers = FeatureNumbers(ids, [str(n) for n in range(len(ids))])
    config = CsftConfig(epochs=2, history_length=3, **csft)
    return EncoderVersions(
        protocol, features, numbers, config, SHAPE, PretrainConfig(epochs=1), found if queries else None
    )


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What a run is given; it learns nothing."""
    calls: list[Call] = []

    def learn(config, fusion, items, numbers, pairs, *, usable):  # type: ignore[no-untyped-def]
        calls.append({"fusion": fusion, "items": items, "numbers": numbers, "pairs": pairs, "usable": usable})

    monkeypatch.setattr(module, "learn", learn)
    return calls


def test_csft_asks_with_what_was_searched_and_no_query_is_a_negative(protocol: Protocol, learned: list[Call]) -> None:
    versions = versions_of(protocol)
    versions.vectors("csft", 0)
    (call,), queries, searches = learned, versions.queries, protocol.log.data.searches
    assert queries is not None and searches is not None
    behind = len(queries)
    both = [n for n in range(behind) if versions.features.has_text_N[queries.items + n]]
    both = [n for n in both if versions.features.has_image_N[queries.items + n]]
    assert len(both) == 1, "the folder has one search of words and a photo"
    size = queries.items + 1 + behind + 2
    assert len(call["usable"]) == size == len(call["numbers"]) == len(call["items"])
    assert call["usable"][1 : queries.items + 1].all() and not call["usable"][queries.items + 1 :].any()
    kinds = {pair.anchor_kind for pair in call["pairs"]}
    assert kinds == set(AnchorKind)
    for pair in call["pairs"]:
        if pair.anchor_kind is AnchorKind.TRIGGER_ITEM:
            assert max(pair.anchor) <= queries.items
            continue
        (anchor,) = pair.anchor
        text, image = (bool(call["items"].has_text_N[anchor]), bool(call["items"].has_image_N[anchor]))
        assert (text, image) == (pair.anchor_kind is AnchorKind.QUERY_TEXT, pair.anchor_kind is AnchorKind.QUERY_IMAGE)
        asked = queries.names[queries.numbers(np.array([int(pair.row.query_image)]))[0] - queries.items - 1]
        assert call["numbers"].item_id(anchor).startswith(asked)


def test_items_have_the_vectors_of_an_encoder_that_knows_no_query(protocol: Protocol, learned: list[Call]) -> None:
    """What is fitted is fitted on items; nothing was learned here."""
    for kind in ("csft", "frozen", "pretrained", "missing-30", "text", "shuffled"):
        found, plain = (versions_of(protocol, queries=one).vectors(kind, 3) for one in (True, False))  # type: ignore[arg-type]
        items = plain.has_vector_EI.shape[1]
        np.testing.assert_array_equal(found.has_vector_EI[:, :items], plain.has_vector_EI)
        np.testing.assert_allclose(found.vectors_EIV[:, :items], plain.vectors_EIV, atol=1e-6, err_msg=kind)
        assert found.has_vector_EI.shape[1] == items + 5 and found.has_vector_EI[:, items:].sum() == 4, kind


@pytest.mark.parametrize("view", ["fused", "same"])
def test_queries_have_the_view_that_training_asks_with(view: str, protocol: Protocol, learned: list[Call]) -> None:
    versions = versions_of(protocol, anchor_view=view)
    (found,) = versions.vectors("csft", 0).vectors_EIV
    fusion = learned[0]["fusion"]
    views = fusion.embed(padded(fusion, versions.features))
    first = versions.numbers.known + 1
    expected = (views.image_ND + views.title_ND if view == "fused" else views.fused_ND)[first:].numpy()
    expected[-1] = 0  # nothing is known of it
    np.testing.assert_allclose(found[first:], unit_or_zero_rows(expected), atol=1e-6)
    np.testing.assert_allclose(
        found[1:first].any(1), versions.features.has_text_N[: first - 1] | versions.features.has_image_N[: first - 1]
    )


@pytest.mark.parametrize("kind", ["image", "text", "missing-70"])
def test_only_items_lose_sides(kind: VectorKind, protocol: Protocol, learned: list[Call]) -> None:
    versions = versions_of(protocol)
    versions.vectors(kind, 0)
    first, size = versions.numbers.known + 1, len(versions.features) + 1
    items = learned[0]["items"]
    np.testing.assert_array_equal(items.has_text_N[first:size], versions.features.has_text_N[first - 1 :])
    np.testing.assert_array_equal(items.has_image_N[first:size], versions.features.has_image_N[first - 1 :])


def test_vectors_are_shuffled_among_items_and_among_queries(protocol: Protocol, learned: list[Call]) -> None:
    versions = versions_of(protocol)
    (made,), (shuffled,) = (versions.vectors(kind, 4).vectors_EIV for kind in ("csft", "shuffled"))  # type: ignore[arg-type]
    first = versions.numbers.known + 1
    for part in (slice(1, first), slice(first, None)):
        assert sorted(made[part].tolist()) == sorted(shuffled[part].tolist()) != shuffled[part].tolist()
        assert made[part].tolist() != shuffled[part].tolist()
    assert not shuffled[0].any()


def test_a_run_that_learns_from_searches_makes_unit_vectors(protocol: Protocol) -> None:
    found = versions_of(protocol).vectors("csft", 0)
    assert np.isfinite(found.vectors_EIV).all()
    lengths = np.linalg.norm(found.vectors_EIV, axis=2)
    np.testing.assert_allclose(lengths, found.has_vector_EI, atol=1e-5)
