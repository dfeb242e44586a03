"""A bundle proves what it is, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.base import ItemContent
from encoders.bundle import DEFAULT_BUNDLE, ImageSpec, TextSpec, WeightsPlace, read_bundle, write_bundle
from encoders.calibration import calibration_items, calibration_pictures
from encoders.config import EncoderConfig
from encoders.digests import file_sha256
from encoders.fixed_fusion import FixedFusion, Projection, draw_projection, fit_projection
from encoders.image import vision_model_sha256
from encoders.loading import load_encoder, make_bundle, text_spec_of
from encoders.preprocess import PREPROCESSING
from encoders.text import text_model_sha256
from schemas.errors import EncodingFailed, Misconfigured, Reason
from tests.factories.encoders import flip_byte, seal
from tests.factories.small_models import write_distilbert, write_vit

FILES = ("bundle.json", "fusion.safetensors", "SHA256SUMS")
ITEM = ItemContent(title="Linen dress", text="With a belt.")


def edit(folder: Path, change: dict[str, Any]) -> None:
    """Change the manifest, and make the checksums fit again."""
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(manifest | change))
    seal(folder, "bundle.json", "fusion.safetensors")


def rewritten(bundle: Path, **specs: TextSpec | ImageSpec) -> Path:
    """The bundle once more beside itself, with other towers."""
    manifest, fusion = read_bundle(bundle)
    towers = {"text": manifest.text, "image": manifest.image} | specs
    write_bundle(bundle.parent / "other", fusion=fusion, recipe=manifest.fusion.recipe, **towers)
    return bundle.parent / "other"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DistilBERT with random weights, saved as any local transformers model is."""
    folder = tmp_path_factory.mktemp("tiny-text")
    write_distilbert(folder, dim=48)
    return folder


@pytest.fixture(scope="module")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with random weights."""
    folder = tmp_path_factory.mktemp("tiny-vision")
    write_vit(folder, patch_size=8)
    return folder


def short_text_model(folder: Path, *, positions: int) -> Path:
    """A text model of so many positions, wide enough for a bundle."""
    write_distilbert(folder, max_position_embeddings=positions)
    return folder


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.99])
    def test_one_changed_byte_in_any_file_is_found(self, bundle: Path, name: str, place: float) -> None:
        flip_byte(bundle / name, int(place * (bundle / name).stat().st_size))
        told = "is damaged" if name != "SHA256SUMS" else "is damaged|does not list|no readable SHA256SUMS"
        with pytest.raises(Misconfigured, match=told):
            read_bundle(bundle)

    def test_what_is_damaged_is_told_with_what_to_do(self, bundle: Path) -> None:
        (bundle / FILES[0]).write_bytes(b"{}")
        with pytest.raises(Misconfigured, match=rf"{FILES[0]} is damaged.*restore it from a copy, or make it again"):
            read_bundle(bundle)

    @pytest.mark.parametrize("name", FILES)
    def test_a_truncated_file_is_found_and_named(self, bundle: Path, name: str) -> None:
        (bundle / name).write_bytes((bundle / name).read_bytes()[:50])
        told = f"{name} is damaged" if name != "SHA256SUMS" else "SHA256SUMS does not list bundle.json"
        with pytest.raises(Misconfigured, match=told):
            read_bundle(bundle)

    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file_is_named(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        with pytest.raises(Misconfigured, match=name):
            read_bundle(bundle)

    def test_a_folder_that_is_no_bundle_names_the_setting(self, tmp_path: Path) -> None:
        with pytest.raises(Misconfigured, match="MIM_ENCODER__BUNDLE"):
            load_encoder(EncoderConfig(bundle=str(tmp_path / "nowhere")))


class TestForeign:
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"format": 2}, "does not fit: format"),
            ({"dim": 64}, "does not come to its version"),
            ({"version": "mm128-0000000000000000"}, "does not come to its version 'mm128-0000000000000000'"),
            ({"fusion": {"image_share": 0.9, "recipe": "x"}}, "does not come to its version"),
            ({"surprise": True}, "does not fit: surprise"),
        ],
    )
    def test_an_edited_manifest_is_refused_even_with_fitting_checksums(
        self, bundle: Path, change: dict[str, Any], told: str
    ) -> None:
        edit(bundle, change)
        with pytest.raises(Misconfigured, match=told):
            read_bundle(bundle)

    def test_other_matrices_than_the_manifest_names_are_refused(self, bundle: Path) -> None:
        manifest, fusion = read_bundle(bundle)
        moved = FixedFusion(Projection(fusion.text.mean + 1, fusion.text.matrix), fusion.image, fusion.image_share)
        other = bundle.parent / "matrices"
        write_bundle(other, text=manifest.text, image=manifest.image, fusion=moved, recipe="other")
        shutil.copy(other / "fusion.safetensors", bundle / "fusion.safetensors")
        seal(bundle, "bundle.json", "fusion.safetensors")
        with pytest.raises(Misconfigured, match="does not come to its version"):
            read_bundle(bundle)

    def test_a_bundle_for_other_preprocessing_is_refused_although_its_content_comes_to_its_version(
        self, bundle: Path
    ) -> None:
        manifest, _ = read_bundle(bundle)
        other = manifest.model_copy(update={"preprocessing": "0"})
        edit(bundle, {"preprocessing": "0", "version": other.address()})
        with pytest.raises(Misconfigured, match=rf"made for preprocessing 0, this is {PREPROCESSING}"):
            read_bundle(bundle)

    def test_a_pickle_in_place_of_the_matrices_is_never_run(self, bundle: Path) -> None:
        torch.save({"text.mean": torch.zeros(1)}, bundle / "fusion.safetensors")
        fusion = json.loads((bundle / "bundle.json").read_text())["fusion"]
        edit(bundle, {"fusion": fusion | {"sha256": file_sha256(bundle / "fusion.safetensors")}})
        with pytest.raises(Misconfigured):
            read_bundle(bundle)

    def test_other_weights_than_the_bundle_was_made_with_are_refused(self, bundle: Path, tiny_text: Path) -> None:
        foreign = TextSpec(weights=WeightsPlace(path=str(tiny_text), sha256="0" * 64), max_tokens=16)
        with pytest.raises(Misconfigured, match="not the ones"):
            load_encoder(EncoderConfig(bundle=str(rewritten(bundle, text=foreign))))

    def test_missing_weights_are_named(self, bundle: Path) -> None:
        weights = WeightsPlace(package="no_such_package_here", path="m", sha256="0" * 64)
        lost = read_bundle(bundle)[0].text.model_copy(update={"weights": weights})
        with pytest.raises(Misconfigured, match="no_such_package_here"):
            load_encoder(EncoderConfig(bundle=str(rewritten(bundle, text=lost))))


class TestVersion:
    def test_the_version_does_not_depend_on_where_the_weights_lie(self, bundle: Path) -> None:
        manifest, _ = read_bundle(bundle)
        elsewhere = WeightsPlace(path="/elsewhere", sha256=manifest.text.weights.sha256)
        moved = manifest.text.model_copy(update={"weights": elsewhere})
        assert manifest.model_copy(update={"text": moved}).address() == manifest.version

    def test_the_version_changes_with_everything_that_changes_vectors(self, bundle: Path) -> None:
        manifest, _ = read_bundle(bundle)
        weights = {"weights": WeightsPlace(path="x", sha256="1" * 64)}
        changed = [
            {"preprocessing": "other"},
            *({"text": manifest.text.model_copy(update=update)} for update in ({"max_tokens": 16}, weights)),
            *({"image": manifest.image.model_copy(update=update)} for update in ({"size": 64}, weights)),
            {"fusion": manifest.fusion.model_copy(update={"sha256": "1" * 64})},
            {"fusion": manifest.fusion.model_copy(update={"image_share": 0.5})},
        ]
        addresses = {manifest.model_copy(update=update).address() for update in changed} | {manifest.version}
        assert len(addresses) == len(changed) + 1

    def test_a_bundle_is_never_written_over(self, bundle: Path) -> None:
        manifest, fusion = read_bundle(bundle)
        with pytest.raises(FileExistsError):
            write_bundle(bundle, text=manifest.text, image=manifest.image, fusion=fusion, recipe="again")

    def test_writing_what_was_read_gives_the_same_bundle(self, bundle: Path) -> None:
        copy = rewritten(bundle)
        for name in FILES:
            assert (copy / name).read_bytes() == (bundle / name).read_bytes()


class TestOtherModels:
    def test_any_local_transformers_models_take_the_towers_place(self, tiny_text: Path, tiny_vision: Path) -> None:
        config = EncoderConfig(text_model=str(tiny_text), image_model=str(tiny_vision))
        encoder, again = load_encoder(config), load_encoder(config)
        assert encoder.version == again.version != load_encoder(EncoderConfig()).version
        vector = encoder.encode([encoder.prepare(ITEM)])
        assert vector.shape == (1, encoder.dim)
        np.testing.assert_allclose(np.linalg.norm(vector), 1.0, atol=1e-5)
        np.testing.assert_allclose(again.encode([again.prepare(ITEM)]), vector, atol=1e-6)

    def test_two_backbones_make_a_bundle_that_loads(self, tmp_path: Path, tiny_text: Path, tiny_vision: Path) -> None:
        text = TextSpec(weights=WeightsPlace(path=str(tiny_text), sha256=text_model_sha256(tiny_text)), max_tokens=32)
        weights = WeightsPlace(path=str(tiny_vision), sha256=vision_model_sha256(tiny_vision))
        image = ImageSpec(kind="transformers", weights=weights, size=32)
        towers = {"text": text, "image": image}
        manifest = make_bundle(tmp_path / "made", config=EncoderConfig(), text_dim=24, image_dim=8, **towers)
        encoder = load_encoder(EncoderConfig(bundle=str(tmp_path / "made")))
        assert (encoder.version, encoder.dim) == (manifest.version, 32)
        assert encoder.encode([encoder.prepare(ITEM)]).shape == (1, 32)

    def test_a_relative_place_is_one_below_the_working_directory(
        self, tiny_text: Path, tiny_vision: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tiny_text.parent)
        relative = EncoderConfig(
            text_model=tiny_text.name, image_model=f"../{tiny_vision.parent.name}/{tiny_vision.name}"
        )
        absolute = EncoderConfig(text_model=str(tiny_text), image_model=str(tiny_vision))
        assert load_encoder(relative).version == load_encoder(absolute).version

    def test_a_model_that_reads_less_than_the_bundles_own_reads_what_it_can(self, tmp_path: Path) -> None:
        folder = short_text_model(tmp_path, positions=77)
        encoder = load_encoder(EncoderConfig(text_model=str(folder)))
        tokens = encoder.prepare(ItemContent(title="wool coat " * 100)).tokens
        assert tokens is not None and len(tokens) == 77
        assert text_spec_of(str(folder), 20, EncoderConfig(), named_by="--text").max_tokens == 20

    def test_a_model_with_too_few_features_is_refused_before_anything_is_fitted(
        self, tmp_path: Path, tiny_text: Path
    ) -> None:
        text = text_spec_of(str(tiny_text), None, EncoderConfig(), named_by="--text")
        image = read_bundle(DEFAULT_BUNDLE)[0].image
        with pytest.raises(Misconfigured, match="text model makes 48 features, a bundle needs 99"):
            make_bundle(tmp_path / "made", text=text, image=image, config=EncoderConfig())
        assert not (tmp_path / "made").exists()

    def test_an_unknown_model_names_the_setting_and_the_way_out(self) -> None:
        with pytest.raises(Misconfigured, match=r"MIM_ENCODER__TEXT_MODEL.*hf download"):
            load_encoder(EncoderConfig(text_model="nobody/never-downloaded-this"))

    def test_reduced_precision_is_another_version_of_nearly_the_same_vectors(self) -> None:
        full, reduced = (load_encoder(EncoderConfig(precision=precision)) for precision in ("fp32", "bf16"))
        assert reduced.version == f"{full.version}-bf16"
        (a,), (b,) = (encoder.encode([encoder.prepare(ITEM)]) for encoder in (full, reduced))
        assert a @ b > 0.999

    def test_a_device_that_is_not_there_is_named(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has one")
        with pytest.raises(Misconfigured, match="MIM_ENCODER__DEVICE"):
            load_encoder(EncoderConfig(device="cuda"))


def drawn(rows: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


class TestFixedFusion:
    NONE = np.empty(0, dtype=np.intp)

    @pytest.fixture
    def fusion(self) -> FixedFusion:
        text, image = drawn(50, 12), drawn(50, 20, seed=4)
        return FixedFusion(draw_projection(text, 4, seed=0), draw_projection(image, 6, seed=1), image_share=0.25)

    def test_a_cosine_is_the_weighted_mean_of_the_modalities(self, fusion: FixedFusion) -> None:
        text, image = drawn(2, 12, seed=1), drawn(2, 20, seed=5)
        rows = np.arange(2)
        fused = fusion(2, rows, text, rows, image)
        t, v = fusion.text(text), fusion.image(image)
        np.testing.assert_allclose(fused[0] @ fused[1], 0.75 * t[0] @ t[1] + 0.25 * v[0] @ v[1], atol=1e-6)

    def test_a_missing_modality_is_the_other_one_alone(self, fusion: FixedFusion) -> None:
        text, image, one = drawn(1, 12, seed=1), drawn(1, 20, seed=5), np.zeros(1, dtype=np.intp)
        np.testing.assert_allclose(fusion(1, one, text, self.NONE, image[:0])[0, :4], fusion.text(text)[0], atol=1e-6)
        np.testing.assert_allclose(fusion(1, self.NONE, text[:0], one, image)[0, 4:], fusion.image(image)[0], atol=1e-6)

    def test_an_item_without_any_modality_is_an_error_not_a_zero_vector(self, fusion: FixedFusion) -> None:
        with pytest.raises(EncodingFailed) as refused:
            fusion(1, self.NONE, drawn(0, 12), self.NONE, drawn(0, 20))
        assert refused.value.reason is Reason.NO_CONTENT

    @pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
    def test_features_without_direction_are_an_error(self, value: float) -> None:
        projection = Projection(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
        with pytest.raises(EncodingFailed) as refused:
            projection(np.full((1, 3), value, dtype=np.float32))
        assert refused.value.reason is Reason.BAD_VECTOR

    def test_fitting_centres_its_own_content(self) -> None:
        features = drawn(400, 16, seed=2) + 3.0
        vectors = fit_projection(features, 6, drop=1)(features)
        cosines = (vectors @ vectors.T)[~np.eye(400, dtype=bool)]
        assert abs(cosines.mean()) < 0.02

    def test_fitting_leaves_out_the_first_directions(self) -> None:
        features = 5.0 + drawn(500, 8, seed=3)
        features[:250, 0] += 40.0  # two kinds of catalogue
        projection = fit_projection(features, 3, drop=1)
        assert np.abs(projection.matrix[0]).max() < 0.2 * np.abs(projection.matrix).max()


def test_calibration_content_is_the_same_every_time() -> None:
    assert calibration_items(50) == calibration_items(50)
    for one, other in zip(calibration_pictures(8, size=32), calibration_pictures(8, size=32), strict=True):
        np.testing.assert_array_equal(one, other)
