"""Vectors of a folder's items, and the records that announce them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoders.features import ItemFeatures, attribute_columns
from streams.simulation.item_vectors import embedding_records, vectors_of
from tests.factories.offline_folders import DAY, START, write, write_stream
from trainer.datasets.folder import open_data_set


class Encoder:
    """The features of the text beside those of the picture."""

    version = "e"

    def vectors(self, features: ItemFeatures) -> NDArray[np.float32]:
        assert 0 < len(features) <= 64 and (features.has_text_N | features.has_image_N).all()
        return np.concatenate([features.text_NT, features.image_NI], axis=1)


def test_items_have_the_vectors_of_what_they_show_and_one_without_any_content_has_none() -> None:
    count = 150
    has_text, has_image = np.arange(count) % 3 == 0, np.arange(count) % 5 == 0
    text, image = (np.arange(1.0, count + 1)[:, None] * has[:, None] for has in (has_text, has_image))
    about = attribute_columns([None] * count, [None] * count, [None] * count, [()] * count)
    features = ItemFeatures(text.astype(np.float32), image.astype(np.float32), has_text, has_image, **about)
    np.testing.assert_array_equal(vectors_of(Encoder().vectors, features), np.concatenate([text, image], axis=1))


def test_a_record_is_of_each_item_with_a_vector_and_of_its_own_content(tmp_path: Path) -> None:
    data = open_data_set(write_stream(tmp_path / "films", users=5, items=4, takes=10), attributes=("cold_holdout",))
    count = len(data.item_ids)
    vectors = np.eye(count, count + 1, dtype=np.float32)
    vectors[1] = 0
    found = list(embedding_records(data, vectors, [f"c{n}" for n in range(count)], version="e"))
    kept = [place for place in range(count) if place != 1]
    assert [one.item_id for one in found] == [data.item_ids[place] for place in kept]
    for place, one in zip(kept, found, strict=True):
        made = one.embedding
        assert made is not None and (made.item_id, made.content_hash) == (one.item_id, f"c{place}")
        assert (made.encoder_version, made.dim) == ("e", count + 1)
        assert np.frombuffer(made.vector, "<f4").tolist() == vectors[place].tolist()


def test_a_record_says_what_the_folder_says_of_its_item_but_for_outcomes(tmp_path: Path) -> None:
    days = [0, 2, 3]  # the first is of the catalogue, the second seems to appear with its first take
    write(
        tmp_path, "items", item_id=["a", "b", "c"], title=[*"ABC"], publish_ts=[START + day * DAY for day in days],
        category=["films", None, "books"], price=[1.5, 2.5, None], year=[1999, None, 2001],
        weight=[0.5, 0.25, 0.125], rank=[2.5, 1.5, 0.5],
    )  # fmt: skip
    seconds = [START, START + 2 * DAY, START + 3 * DAY + 1]
    write(tmp_path, "interactions", user_id=["u"] * 3, item_id=["a", "b", "c"], ts=seconds, label=[1] * 3)
    data = open_data_set(tmp_path)
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    found = [one.embedding for one in embedding_records(data, vectors, "xyz", version="v", outcomes=["rank"])]
    assert {one.encoder_version for one in found if one} == {"v"}
    assert [(one.published_at.timestamp(), one.published_at_is) for one in found if one] == [
        (START, "unknown"), (START + 2 * DAY, "inferred"), (START + 3 * DAY, "known")
    ]  # fmt: skip
    assert [(one.category, one.price, one.year) for one in found if one] == [
        ("films", 1.5, 1999), (None, 2.5, None), ("books", None, 2001)
    ]  # fmt: skip
    assert [one.attributes for one in found if one] == [{"weight": 0.5}, {"weight": 0.25}, {"weight": 0.125}]
    (whole, *_) = embedding_records(data, vectors, "xyz", version="v")
    assert whole.embedding is not None and set(whole.embedding.attributes) == {"weight", "rank"}
