"""Trained bundles: written whole, read back the same, refused when damaged or foreign."""

import json

import numpy as np
import pytest
import torch

from encoders.base import ItemContent, Prepared
from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from encoders.trained import TrainedEncoder, TrainingManifest, is_trained, read_trained, write_trained
from schemas.errors import Misconfigured
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
