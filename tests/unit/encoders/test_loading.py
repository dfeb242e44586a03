"""Encoders from settings and small models: what is refused, what is found, and which files decide a version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.base import ItemContent
from encoders.bert import Bert
from encoders.bundle import DEFAULT_BUNDLE, ImageSpec, TextSpec, WeightsPlace, read_bundle, write_bundle
from encoders.calibration import calibration_pictures
from encoders.config import EncoderConfig
from encoders.fixed_fusion import FixedFusion, draw_projection
from encoders.fusion import ItemFusion
from encoders.image import TransformersVision, vision_model_sha256
from encoders.loading import DEFAULT_TOKENS, image_spec_of, load_encoder, make_bundle, text_spec_of
from encoders.text import text_model_sha256
from encoders.trained import TrainingManifest, write_trained
from schemas.errors import EncodingFailed, Misconfigured, Reason
from tests.factories.csft import SMALL
from tests.factories.encoders import seal
from tests.factories.small_models import write_bert, write_vit

PICTURES = calibration_pictures(3, size=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in `text` and a ViT in `image` whose pictures have a mean and a deviation of their own."""
    folder = tmp_path_factory.mktemp("models")
    write_bert(folder / "text", num_hidden_layers=1, intermediate_size=16)
    write_vit(folder / "image", patch_size=16)
    settings = json.loads((folder / "image" / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "image" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def specs(models: Path, **places: str) -> dict[str, Any]:
    text = WeightsPlace(path=places.get("text", str(models / "text")), sha256=text_model_sha256(models / "text"))
    image = WeightsPlace(path=places.get("image", str(models / "image")), sha256=vision_model_sha256(models / "image"))
    return {
        "text": TextSpec(weights=text, max_tokens=16),
        "image": ImageSpec(kind="transformers", weights=image, size=32),
    }


def fixed() -> FixedFusion:
    text, image = (draw_projection(np.eye(2, width, dtype=np.float32), 4, seed=0) for width in (48, 40))
    return FixedFusion(text, image, image_share=0.2)


@pytest.fixture
def bundle(tmp_path: Path, models: Path) -> Path:
    write_bundle(tmp_path / "bundle", **specs(models), fusion=fixed(), recipe="r")
    return tmp_path / "bundle"


@pytest.fixture
def trained(bundle: Path) -> Path:
    fusion = ItemFusion(SMALL, text_width=48, image_width=40)
    folder = bundle.parent / "trained"
    story = TrainingManifest(stage="csft", parent="p", data="d")
    write_trained(folder, towers=read_bundle(bundle)[0], fusion=fusion, training=story)
    return folder


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "as_view"), [({"anchor_view": "fused"}, True), ({"anchor_view": "same"}, False), ({}, False)]
)
def test_searches_are_encoded_as_the_training_of_the_bundle_asked(
    bundle: Path, asked: dict[str, str], as_view: bool
) -> None:
    fusion = ItemFusion(SMALL, text_width=48, image_width=40)
    story = TrainingManifest(stage="csft", parent="p", data="d", settings=asked)
    write_trained(bundle.parent / "trained", towers=read_bundle(bundle)[0], fusion=fusion, training=story)
    encoder = load_encoder(EncoderConfig(bundle=str(bundle.parent / "trained")))
    batch = [encoder.prepare(ItemContent(title="coat"))]
    as_item, as_query = encoder.encode(batch), encoder.encode_queries(batch)
    assert bool((np.abs(as_item - as_query) > 1e-3).any()) == as_view


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["bundle", "trained"])
def test_limits_of_pictures_and_threads_are_those_of_the_settings(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    settings: dict[str, Any] = {"max_image_bytes": 2_000, "max_image_pixels": 5_000, "num_threads": 2}
    encoder = load_encoder(EncoderConfig(bundle=str(folder), **settings))
    assert torch.get_num_threads() == 2
    with pytest.raises(EncodingFailed, match="the limit is 2000") as refused:
        encoder.prepare(ItemContent(image=b"\xff\xd8\xff" + bytes(2_000)))
    assert refused.value.reason is Reason.IMAGE_TOO_LARGE
    wide = b"BM" + bytes(12) + (40).to_bytes(4, "little") + (5_001).to_bytes(4, "little") + (1).to_bytes(4, "little")
    wide += b"\x01\x00\x18\x00" + bytes(24)
    with pytest.raises(EncodingFailed, match="the limit is 5000"):
        encoder.prepare(ItemContent(image=wide))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"text_model": "x"}, "unset MIM_ENCODER__TEXT_MODEL"),
        ({"image_model": "x"}, "unset MIM_ENCODER__TEXT_MODEL and MIM_ENCODER__IMAGE_MODEL"),
        ({"width": 9}, "MIM_ENCODER__WIDTH=9"),
    ],
)
def test_a_trained_bundle_refuses_other_towers_and_other_widths(
    trained: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(Misconfigured, match=told):
        load_encoder(EncoderConfig(bundle=str(trained), **settings))


def test_a_width_is_for_trained_bundles_and_names_a_version_of_its_own(bundle: Path, trained: Path) -> None:
    with pytest.raises(Misconfigured, match="MIM_ENCODER__WIDTH=8: only a trained bundle"):
        load_encoder(EncoderConfig(bundle=str(bundle), width=8))
    whole, half = (load_encoder(EncoderConfig(bundle=str(trained), width=width)) for width in (None, 8))
    assert (whole.dim, half.dim, half.version) == (16, 8, f"{whole.version}-w8")


def test_weights_lie_where_the_bundle_says_also_inside_it(bundle: Path, models: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside_specs = specs(models, text="towers/text", image="towers/image")
    manifest = write_bundle(inside, **inside_specs, fusion=fixed(), recipe="r")
    with pytest.raises(Misconfigured, match=rf"encoder weights are missing: {inside}/towers/text"):
        load_encoder(EncoderConfig(bundle=str(inside)))
    (inside / "towers").symlink_to(models)
    found, same = (load_encoder(EncoderConfig(bundle=str(place))) for place in (inside, bundle))
    assert found.version == same.version == manifest.version
    one, two = (each.encode([each.prepare(ItemContent(title="coat"))]) for each in (found, same))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("package", ["no_such_package_here", "this"])
def test_a_package_that_holds_no_weights_is_named(package: str) -> None:
    with pytest.raises(Misconfigured, match=f"needs the Python package '{package}'"):
        WeightsPlace(package=package, path="x", sha256="0" * 64).resolve(None)


def test_a_place_in_a_package_is_inside_it() -> None:
    assert WeightsPlace(package="encoders", path="bundles", sha256="0" * 64).resolve(None) == DEFAULT_BUNDLE.parent
    with pytest.raises(Misconfigured, match=r"weights are missing: .*encoders/nowhere"):
        WeightsPlace(package="encoders", path="nowhere", sha256="0" * 64).resolve(None)


def test_vision_weights_that_were_changed_are_refused(bundle: Path, models: Path, tmp_path: Path) -> None:
    other = ImageSpec(kind="transformers", weights=WeightsPlace(path=str(models / "image"), sha256="0" * 64), size=32)
    write_bundle(tmp_path / "other", text=read_bundle(bundle)[0].text, image=other, fusion=fixed(), recipe="r")
    with pytest.raises(Misconfigured, match=r"models.*image are not the ones"):
        load_encoder(EncoderConfig(bundle=str(tmp_path / "other")))


@pytest.mark.parametrize("side", ["text", "image"])
def test_trained_tower_weights_that_do_not_fit_the_towers_are_refused(bundle: Path, side: str) -> None:
    fusion, folder = ItemFusion(SMALL, text_width=48, image_width=40), bundle.parent / "tuned"
    story = TrainingManifest(stage="csft", parent="p", data="d")
    weights = {f"{side}.no.such.weight": torch.zeros(2)}
    write_trained(folder, towers=read_bundle(bundle)[0], fusion=fusion, training=story, tower_weights=weights)
    with pytest.raises(Misconfigured, match=r"trained tower weights do not fit: no\.such\.weight is no weight"):
        load_encoder(EncoderConfig(bundle=str(folder)))


def test_matrices_of_another_width_than_the_manifest_names_are_refused(bundle: Path) -> None:
    manifest = read_bundle(bundle)[0].model_copy(update={"dim": 9})
    manifest = manifest.model_copy(update={"version": manifest.address()})
    (bundle / "bundle.json").write_text(manifest.model_dump_json())
    seal(bundle, "bundle.json", "fusion.safetensors")
    with pytest.raises(Misconfigured, match="matrices make 8 dimensions, not 9"):
        read_bundle(bundle)


def test_the_files_of_a_bundle_can_be_read_by_everyone(bundle: Path, trained: Path) -> None:
    for path in [*bundle.iterdir(), *trained.iterdir()]:
        assert path.stat().st_mode & 0o444 == 0o444, path.name


def test_models_are_given_by_folder_with_the_tokens_and_the_size_that_they_declare(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(models))
    config = EncoderConfig()
    text = text_spec_of("~/text", None, config, named_by="--text")
    assert (text.max_tokens, text.weights.sha256) == (64, text_model_sha256(models / "text"))
    image = image_spec_of("~/image", config, named_by="--image")
    assert (image.kind, image.size, image.weights.path) == ("transformers", 32, str(models / "image"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((models / "text" / name).read_bytes())
    long = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(long))
    assert text_spec_of(str(tmp_path), None, config, named_by="--text").max_tokens == DEFAULT_TOKENS
    assert text_spec_of(str(tmp_path), 300, config, named_by="--text").max_tokens == 300


@pytest.mark.parametrize("allowed", [False, True])
def test_a_model_of_the_hub_is_downloaded_only_where_that_is_allowed_and_never_as_a_pickle(
    models: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    asked: list[Any] = []

    def snapshot(name: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append((name, local_files_only))
        assert "*.safetensors" in allow_patterns and not {"*", "*.bin", "*.py", "*.pt"} & set(allow_patterns)
        return str(models / "text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    spec = text_spec_of("some/model", None, EncoderConfig(allow_hub_download=allowed), named_by="--text")
    assert asked == [("some/model", not allowed)] and spec.weights.path == str(models / "text")


def test_an_image_model_with_too_few_features_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="image model makes 40 features, a bundle needs 41"):
        make_bundle(tmp_path / "made", **specs(models), config=EncoderConfig(), text_dim=45, image_dim=39)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors", "more.safetensors"]


def test_every_file_that_decides_features_is_part_of_a_models_digest_and_no_other(tmp_path: Path) -> None:
    for name in FILES[:-1]:
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "preprocessor_config.json").write_bytes(b"1")
    text, vision = [text_model_sha256(tmp_path)], [vision_model_sha256(tmp_path)]
    for name in FILES:
        (tmp_path / name).write_bytes(b"2")
        text.append(text_model_sha256(tmp_path))
        vision.append(vision_model_sha256(tmp_path))
    assert len(set(text)) == len(FILES) + 1
    assert len(set(vision)) == 4  # the tokenizer is none of its files
    (tmp_path / "preprocessor_config.json").write_bytes(b"2")
    assert vision_model_sha256(tmp_path) not in vision and text_model_sha256(tmp_path) == text[-1]
    (tmp_path / "README.md").write_bytes(b"2")
    assert text_model_sha256(tmp_path) == text[-1]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_configuration_or_safe_weights_is_no_model(tmp_path: Path, missing: str) -> None:
    for name in {"config.json", "model.safetensors", "pytorch_model.bin"} - {missing}:
        (tmp_path / name).write_bytes(b"1")
    with pytest.raises(Misconfigured, match=r"needs config\.json and .*safetensors"):
        text_model_sha256(tmp_path)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ({}, True),
        ({"position_embedding_type": "absolute"}, True),
        ({"position_embedding_type": "relative_key"}, False),
        ({"hidden_act": "gelu_new"}, False),
        ({"is_decoder": True}, False),
        ({"model_type": "roberta"}, False),
        ({"model_type": None}, False),
    ],
)
def test_only_the_architecture_that_is_computed_here_is_read_as_bert(change: dict[str, Any], read: bool) -> None:
    assert Bert.reads({"model_type": "bert", "hidden_act": "gelu"} | change) is read


def test_pictures_are_scaled_as_the_model_declares_and_pooled_as_it_pools(models: Path) -> None:
    from transformers import ViTModel

    tower = TransformersVision(models / "image")
    pixels = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        expected = ViTModel.from_pretrained(models / "image")(pixel_values=(pixels - mean) / std).pooler_output
    np.testing.assert_allclose(tower.features(PICTURES), expected.numpy(), atol=1e-5)
    assert (tower.size, tower.width, tower.features([]).shape) == (32, 40, (0, 40))
    with pytest.raises(ValueError, match="nowhere is no weight"):
        tower.load({"nowhere": torch.zeros(1)})
    name = "pooler.dense.bias"
    with pytest.raises(ValueError, match="is no weight"):
        tower.load({name: torch.zeros(1)})
    tower.load({name: torch.ones(40)})
    assert not np.allclose(tower.features(PICTURES), expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("states", [torch.arange(24.0).view(2, 4, 3), torch.arange(24.0).view(2, 3, 2, 2)])
def test_a_model_that_pools_nothing_is_averaged_over_its_places(models: Path, states: torch.Tensor) -> None:
    class Network:
        def __call__(self, pixel_values: Any) -> Any:
            return type("Output", (), {"last_hidden_state": states, "pooler_output": None})()

    found = TransformersVision(models / "image").pooled(torch.zeros(2, 3, 32, 32), Network())
    expected = states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)
    torch.testing.assert_close(found, expected)
