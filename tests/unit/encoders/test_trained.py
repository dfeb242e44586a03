"""Trained bundles: written whole, read back the same, refused when damaged or foreign."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from encoders.base import ItemContent, Prepared
from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from encoders.digests import file_sha256
from encoders.trained import (
    TrainedEncoder,
    TrainingManifest,
    is_trained,
    read_tower_weights,
    read_trained,
    write_trained,
)
from schemas.errors import EncodingFailed, Misconfigured, Reason
from tests.factories.csft import SMALL, make_features, make_fusion
from tests.factories.encoders import flip_byte, seal

TRAINING = TrainingManifest(stage="csft", parent="mm128-0", data="made-up", offsets={"behaviours": {0: 7}}, pairs=3)


FILES = ("trained.json", "trained.safetensors", "training.json")


@pytest.fixture
def towers():
    return read_bundle(DEFAULT_BUNDLE)[0]


@pytest.fixture
def folder(tmp_path, towers):
    write_trained(tmp_path / "bundle", towers=towers, fusion=make_fusion(make_features()), training=TRAINING)
    return tmp_path / "bundle"


def test_a_bundle_comes_back_as_it_was_written(folder):
    manifest, training, fusion = read_trained(folder)
    features = make_features()
    expected = make_fusion(features)
    torch.testing.assert_close(
        fusion.embed(fusion.prepare(features)).fused_ND, expected.embed(expected.prepare(features)).fused_ND
    )
    assert training == TRAINING and training.offsets == {"behaviours": {0: 7}}
    assert manifest.fusion == SMALL and manifest.version.startswith("csft16-")
    assert is_trained(folder)


def test_the_version_follows_the_weights_and_not_the_story(tmp_path, towers):
    def version(name, change=0.0, **story):
        fusion = make_fusion(make_features())
        with torch.no_grad():
            fusion.text_head.bias += change
        training = TRAINING.model_copy(update=story)
        return write_trained(tmp_path / name, towers=towers, fusion=fusion, training=training).version

    assert version("a") == version("b", pairs=99)
    assert version("c", change=1e-4) != version("d")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(folder, name):
    flip_byte(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(Misconfigured, match=rf"{name} is damaged.*restore it from a copy, or train it again"):
        read_trained(folder)


def test_a_missing_file_is_named(folder):
    (folder / "trained.safetensors").unlink()
    with pytest.raises(Misconfigured, match=r"trained\.safetensors"):
        read_trained(folder)


def test_a_bundle_whose_sums_were_made_anew_after_an_edit_is_refused(folder):
    manifest = json.loads((folder / "trained.json").read_text())
    manifest["fusion"]["kind"] = "tensor"
    (folder / "trained.json").write_text(json.dumps(manifest))
    seal(folder, *FILES)
    with pytest.raises(Misconfigured, match="edited"):
        read_trained(folder)


def test_other_weights_are_refused_even_with_fitting_sums(folder):
    flip_byte(folder / "trained.safetensors", (folder / "trained.safetensors").stat().st_size - 1)
    seal(folder, *FILES)
    with pytest.raises(Misconfigured, match="edited"):
        read_trained(folder)


def test_a_fusion_for_towers_of_another_width_is_refused():
    class Wider:
        tower_widths = (21, 30)

    with pytest.raises(ValueError, match=r"towers make \(21, 30\)"):
        TrainedEncoder(Wider(), make_fusion(make_features()), version="csft16-x")


def test_a_folder_in_use_is_never_written_to(folder, towers):
    with pytest.raises(FileExistsError):
        write_trained(folder, towers=towers, fusion=make_fusion(make_features()), training=TRAINING)


def test_nothing_is_left_behind_when_writing_fails(tmp_path, towers, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("encoders.trained.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_trained(tmp_path / "new", towers=towers, fusion=make_fusion(make_features()), training=TRAINING)
    assert list(tmp_path.iterdir()) == []


def test_category_year_and_price_of_an_item_are_part_of_what_is_encoded():
    class Towers:
        tower_widths = (20, 30)

        def prepare(self, content):
            return Prepared(tokens=(1,), pixels=None)

    encoder = TrainedEncoder(Towers(), make_fusion(make_features()), version="csft16-x")
    one = encoder.prepare(ItemContent(title="coat", category="Coats", year=2001, price=5.0))
    assert (one.tokens, one.category, one.year, one.price) == ((1,), "Coats", 2001, 5.0)


def test_vectors_keep_a_nested_prefix_on_request_and_say_so_in_their_version():
    class Towers:
        tower_widths = (20, 30)

        def tower_features(self, batch):
            features = make_features()
            rows = [item.price for item in batch]
            return features.text_NT[rows], features.image_NI[rows]

    fusion = make_fusion(make_features())
    pixels = np.zeros((1, 1, 3), np.uint8)
    batch = [Prepared(tokens=(1,), pixels=pixels, price=row) for row in (0, 1, 2)]
    whole = TrainedEncoder(Towers(), fusion, version="csft16-x")
    half = TrainedEncoder(Towers(), fusion, version="csft16-x", width=8)
    prefix = whole.encode(batch)[:, :8]
    np.testing.assert_allclose(half.encode(batch), prefix / np.linalg.norm(prefix, axis=1, keepdims=True), atol=1e-6)
    assert (whole.dim, half.dim) == (16, 8) and half.version == "csft16-x-w8"
    assert whole.encode([]).shape == (0, 16)
    with pytest.raises(Misconfigured, match="MIM_ENCODER__WIDTH=9"):
        TrainedEncoder(Towers(), fusion, version="csft16-x", width=9)


class Rows:
    """Towers whose features are those of a row of made-up items, named by the price."""

    tower_widths = (20, 30)

    def tower_features(self, batch):
        features, rows = make_features(), [int(item.price) for item in batch]
        return features.text_NT[rows], features.image_NI[rows]


def rows_of(numbers):
    pixels = np.zeros((1, 1, 3), np.uint8)
    return [Prepared(tokens=(1,), pixels=pixels, price=row, category="c", year=2000) for row in numbers]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_a_row_is_the_same_alone_and_in_a_batch_of_any_size(count):
    encoder = TrainedEncoder(Rows(), make_fusion(make_features()), version="csft16-x")
    together = encoder.encode(rows_of(range(count)))
    assert together.shape == (count, 16)
    for row in {0, count // 2, count - 1}:
        np.testing.assert_array_equal(encoder.encode(rows_of([row]))[0], together[row])


class Sides(Rows):
    """The same, of which a query may lack words or photo."""

    def tower_features(self, batch):
        text, image = super().tower_features(batch)
        has_text = np.array([item.tokens is not None for item in batch])
        has_image = np.array([item.pixels is not None for item in batch])
        return text * has_text[:, None], image * has_image[:, None]


@pytest.mark.parametrize("width", [None, 8])
def test_a_search_is_the_view_of_what_it_asks_with(width):
    fusion = make_fusion(make_features())
    both = rows_of([2, 7])
    words, photos = ([replace(one, **{lack: None}) for one in both] for lack in ("pixels", "tokens"))
    encoder = TrainedEncoder(Sides(), fusion, version="csft16-x", width=width, queries_are_views=True)
    views = fusion(fusion.prepare(encoder.features(both)))

    def unit(rows):
        return (rows[:, :width] / rows[:, :width].norm(dim=1, keepdim=True)).numpy()

    asked = (words, views.title_ND), (photos, views.image_ND), (both, views.title_ND + views.image_ND)
    for batch, expected in asked:
        np.testing.assert_allclose(encoder.encode_queries(batch), unit(expected), atol=1e-6)
    assert encoder.encode_queries([]).shape == (0, width or 16)
    alike = TrainedEncoder(Sides(), fusion, version="csft16-x", width=width)
    np.testing.assert_array_equal(alike.encode_queries(words), encoder.encode(words))
    assert np.abs(encoder.encode_queries(words) - encoder.encode(words)).max() > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_an_error_that_blames_the_weights(value):
    fusion = make_fusion(make_features())
    with torch.no_grad():
        fusion.text_in.weight[3, 3] = value
    with pytest.raises(EncodingFailed) as refused:
        TrainedEncoder(Rows(), fusion, version="csft16-x").encode(rows_of([0, 1]))
    assert refused.value.reason is Reason.BAD_VECTOR


def test_a_prefix_without_direction_is_an_error_too():
    fusion = make_fusion(make_features())

    def sided(items):
        views = type(fusion).forward(fusion, items)
        views.fused_ND[:, :8] = 0
        return views

    fusion.forward = sided
    assert np.isfinite(TrainedEncoder(Rows(), fusion, version="x").encode(rows_of([0]))).all()
    with pytest.raises(EncodingFailed, match="zero or not finite"):
        TrainedEncoder(Rows(), fusion, version="x", width=8).encode(rows_of([0]))


def test_the_whole_width_is_no_version_of_its_own():
    assert TrainedEncoder(Rows(), make_fusion(make_features()), version="csft16-x", width=16).version == "csft16-x"


def rewritten(folder, **change):
    """The manifest once more, with its version and sums made to fit."""
    manifest = read_trained(folder)[0].model_copy(update=change)
    manifest = manifest.model_copy(update={"version": manifest.address()})
    (folder / "trained.json").write_text(manifest.model_dump_json())
    seal(folder, *FILES)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"preprocessing": "0"}, "made for preprocessing 0, .*train it again"),
        ({"fusion": SMALL.model_copy(update={"kind": "tensor"})}, r"trained\.safetensors does not fit the fusion"),
        ({"text_width": 21}, r"trained\.safetensors does not fit the fusion"),
    ],
)
def test_a_bundle_that_names_itself_rightly_and_fits_nothing_here_is_refused(folder, change, told):
    rewritten(folder, **change)
    with pytest.raises(Misconfigured, match=told):
        read_trained(folder)


@pytest.mark.parametrize("tuned", [False, True])
def test_sums_cover_every_file_and_an_empty_folder_may_be_there_before(tmp_path, towers, tuned):
    weights = {"text.b": torch.ones(2), "image.a.c": torch.zeros(3)} if tuned else {}
    fusion = make_fusion(make_features())
    (tmp_path / "new").mkdir()
    manifest = write_trained(tmp_path / "new", towers=towers, fusion=fusion, training=TRAINING, tower_weights=weights)
    lines = (tmp_path / "new" / "SHA256SUMS").read_text().splitlines()
    names = {path.name for path in (tmp_path / "new").iterdir()} - {"SHA256SUMS"}
    assert sorted(lines) == sorted(f"{file_sha256(tmp_path / 'new' / name)}  {name}" for name in names)
    assert ("towers.safetensors" in names) is tuned is (manifest.towers_sha256 is not None)
    found = read_tower_weights(tmp_path / "new", manifest)
    assert {side: set(one) for side, one in found.items()} == ({"text": {"b"}, "image": {"a.c"}} if tuned else {})
    if tuned:
        (tmp_path / "new" / "towers.safetensors").unlink()
        with pytest.raises(Misconfigured, match=r"cannot read towers\.safetensors"):
            read_tower_weights(tmp_path / "new", manifest)


def test_where_the_towers_lie_is_no_part_of_the_version_and_what_they_are_is(folder):
    manifest = read_trained(folder)[0]

    def address(side, place=None, **change):
        part = getattr(manifest, side)
        weights = part.weights.model_copy(update=place or {})
        return manifest.model_copy(update={side: part.model_copy(update={"weights": weights, **change})}).address()

    for side, change in (("text", {"max_tokens": 9}), ("image", {"size": 99})):
        assert address(side, {"path": "elsewhere", "package": None}) == manifest.version
        others = {address(side, {"sha256": "1" * 64}), address(side, **change), manifest.version}
        assert len(others) == 3


class Words:
    """Prepares an item with these attributes."""

    def prepare(self, encoder, attributes):
        encoder.towers.prepare = lambda content: Prepared(tokens=(1,), pixels=np.zeros((1, 1, 3), np.uint8))
        return encoder.prepare(ItemContent(title="x", price=3.0, category="c", year=2000, attributes=attributes))


def test_a_bundle_of_a_build_without_attributes_keeps_its_version_and_its_vectors(tmp_path, towers):
    fusion = make_fusion(make_features(), SMALL.model_copy(update={"attribute_rows": 0}))
    made = write_trained(tmp_path / "old", towers=towers, fusion=fusion, training=TRAINING)
    written = json.loads((tmp_path / "old" / "trained.json").read_text())
    del written["fusion"]["attribute_rows"], written["fusion"]["attribute_width"]  # as that build wrote it
    (tmp_path / "old" / "trained.json").write_text(json.dumps(written))
    seal(tmp_path / "old", *FILES)
    manifest, _, found = read_trained(tmp_path / "old")
    assert manifest.version == made.version and found.config.attribute_rows == 0
    encoder = TrainedEncoder(Rows(), found, version=manifest.version)
    assert Words().prepare(encoder, {"colour": "red"}).words == ()
    same = TrainedEncoder(Rows(), fusion, version="x").encode(rows_of([3]))
    np.testing.assert_array_equal(encoder.encode(rows_of([3])), same)


def test_attributes_are_part_of_what_is_encoded_and_of_its_digest():
    fusion = make_fusion(make_features())
    with torch.no_grad():
        torch.nn.init.normal_(fusion.attributes.weight, std=0.3)
    encoder = TrainedEncoder(Rows(), fusion, version="x")
    red, same, blue, none = (
        Words().prepare(encoder, attributes)
        for attributes in ({"colour": "red"}, {"colour": "RED ", "pages": 3.0}, {"colour": "blue"}, {})
    )
    assert red.address == same.address and len({red.address, blue.address, none.address}) == 3
    vectors = encoder.encode([red, same, blue, none])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert abs(vectors[0] @ vectors[2]) < 0.999 and abs(vectors[0] @ vectors[3]) < 0.999
