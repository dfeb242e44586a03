"""What training starts from and where its bundle lies, over small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.base import ItemContent
from encoders.bundle import ImageSpec, TextSpec, WeightsPlace, read_bundle, write_bundle
from encoders.calibration import calibration_items
from encoders.config import EncoderConfig
from encoders.features import attribute_columns
from encoders.fixed_fusion import FixedFusion, draw_projection
from encoders.fusion_config import FusionConfig
from encoders.image import vision_model_sha256
from encoders.text import text_model_sha256
from encoders.trained import TrainingManifest, read_tower_weights, read_trained
from encoders.tuning import TunedTowers
from encoders.tuning_config import TuningConfig
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of, towers_digest
from streams.encoder_training.config import EncoderTrainingConfig
from tests.factories.csft import make_features
from tests.factories.offline_folders import START, write
from tests.factories.small_models import write_bert, write_vit
from trainer.datasets.folder import open_data_set

SHAPE = FusionConfig(width=8, nested_widths=(), text_rank=8, image_rank=8, hidden=0)
STORY = TrainingManifest(stage="csft", parent="p", data="d")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a BERT of two layers and a ViT."""
    models = tmp_path_factory.mktemp("models")
    write_bert(models / "text", num_hidden_layers=2, intermediate_size=16)
    write_vit(models / "image", patch_size=16)
    text = WeightsPlace(path=str(models / "text"), sha256=text_model_sha256(models / "text"))
    image = WeightsPlace(path=str(models / "image"), sha256=vision_model_sha256(models / "image"))
    side, other = (draw_projection(np.eye(2, width, dtype=np.float32), 4, seed=0) for width in (48, 40))
    towers = {"text": TextSpec(weights=text, max_tokens=16)}
    write_bundle(
        models / "bundle", **towers, image=ImageSpec(kind="transformers", weights=image, size=32),
        fusion=FixedFusion(side, other, image_share=0.2), recipe="r",
    )  # fmt: skip
    return models / "bundle"


def builder_of(bundle: Path, folder: Path, **settings: Any) -> BundleBuilder:
    training = EncoderTrainingConfig(folder=folder / "encoders", cache_folder=folder / "cache")
    return BundleBuilder(EncoderConfig(bundle=str(bundle), **settings), training)


def features() -> Any:
    rng, whole = np.random.default_rng(0), make_features(20)
    text, image = rng.standard_normal((20, 48)), rng.standard_normal((20, 40))
    columns = attribute_columns(["c"] * 20, [2000.0] * 20, [1.0] * 20, [()] * 20)
    return type(whole)(
        text.astype(np.float32), image.astype(np.float32), np.ones(20, bool), np.ones(20, bool), **columns
    )


def test_a_bundle_lies_under_its_version_or_where_it_was_asked_for_and_is_what_training_goes_on_from(
    fixed: Path, tmp_path: Path
) -> None:
    first = builder_of(fixed, tmp_path)
    assert first.parent == read_bundle(fixed)[0].version
    fusion = first.fusion(SHAPE, features(), seed=1)
    assert fusion.config == SHAPE
    weights = [first.fusion(SHAPE, features(), seed=seed).category_table.weight for seed in (1, 2)]
    assert torch.equal(weights[0], fusion.category_table.weight) and not torch.equal(weights[1], weights[0])
    place, version = first.write(fusion, STORY, None)
    assert place == tmp_path / "encoders" / version and read_trained(place)[0].version == version
    again, same = first.write(fusion, STORY, None)
    assert same == version and again != place and read_trained(again)[0].version == version
    asked, _ = first.write(fusion, STORY, tmp_path / "mine")
    assert asked == tmp_path / "mine"
    with pytest.raises(Misconfigured, match=r"--out: .*mine is not empty"):
        first.write(fusion, STORY, tmp_path / "mine")

    second = builder_of(place, tmp_path)
    assert second.parent == version
    parent = second.fusion(FusionConfig(), features(), seed=9)
    assert parent.config == SHAPE and torch.equal(parent.category_table.weight, fusion.category_table.weight)
    with pytest.raises(Misconfigured, match="MIM_FUSION__WIDTH=8"):
        second.fusion(FusionConfig(width=16, nested_widths=()), features(), seed=9)
    for named in ({"text_model": "x"}, {"image_model": "x"}):
        with pytest.raises(Misconfigured, match="last only while a process runs"):
            builder_of(place, tmp_path, **named)


def test_what_an_earlier_training_changed_goes_on_beside_what_this_one_changes(fixed: Path, tmp_path: Path) -> None:
    first = builder_of(fixed, tmp_path)
    fusion = first.fusion(SHAPE, features(), seed=1)
    tuned = TunedTowers(first.towers, TuningConfig(layers="last_blocks", image=False))
    assert {name.split(".")[3] for name in tuned.changes()} == {"1"}
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(1.0)
    place, _ = first.write(fusion, STORY, None, towers=tuned)
    once = read_tower_weights(place, read_trained(place)[0])["text"]

    second = builder_of(place, tmp_path)
    assert second.cache.folder != first.cache.folder
    both = TunedTowers(second.towers, TuningConfig(layers="last_blocks", blocks=2, image=False))
    assert {name.split(".")[3] for name in both.changes()} == {"0", "1"}
    heads, _ = second.write(second.fusion(SHAPE, features(), seed=1), STORY, tmp_path / "heads")
    kept = read_tower_weights(heads, read_trained(heads)[0])["text"]
    assert kept.keys() == once.keys() and all(torch.equal(kept[name], once[name]) for name in once)
    with torch.no_grad():
        for weight in both.parameters():
            weight.add_(1.0)
    twice, _ = second.write(second.fusion(SHAPE, features(), seed=1), STORY, tmp_path / "twice", towers=both)
    again = read_tower_weights(twice, read_trained(twice)[0])["text"]
    assert again.keys() > once.keys() and all(not torch.equal(again[name], once[name]) for name in once)
    second = builder_of(place, tmp_path)
    picture = TunedTowers(second.towers, TuningConfig(layers="last_blocks", text=False))
    further, _ = second.write(second.fusion(SHAPE, features(), seed=1), STORY, tmp_path / "further", towers=picture)
    found = read_tower_weights(further, read_trained(further)[0])
    assert set(found) == {"text", "image"} and all(torch.equal(found["text"][name], once[name]) for name in once)


def test_features_are_kept_by_all_that_decides_them_and_not_by_where_weights_lie(fixed: Path) -> None:
    specs = read_bundle(fixed)[0]

    def digest(side: str | None = None, place: dict[str, Any] | None = None, **change: Any) -> str:
        if side is None:
            return towers_digest(specs.model_copy(update=change))
        part = getattr(specs, side)
        part = part.model_copy(update={"weights": part.weights.model_copy(update=place or {}), **change})
        return towers_digest(specs.model_copy(update={side: part}))

    other = {"sha256": "1" * 64}
    changed = [
        digest(), digest(preprocessing="0"), digest("text", other), digest("text", max_tokens=9),
        digest("image", other), digest("image", size=64), digest("image", kind="efficientnet-lite0"),
    ]  # fmt: skip
    assert len(set(changed)) == len(changed)
    assert digest("text", {"path": "elsewhere"}) == digest("image", {"package": "p"}) == digest()


@pytest.mark.parametrize("rows_per_read", [1, 2, 3, 256])
def test_items_of_a_folder_come_whole_in_its_order_with_their_pictures(tmp_path: Path, rows_per_read: int) -> None:
    folder = tmp_path / "set"
    write(
        folder, "items", item_id=["b", "a", "c"], title=["bee", "ay", "sea"], publish_ts=[START, START + 1, START + 2],
        text=["of b", None, ""], category=["B", None, None], price=[1.5, None, 0.0], year=[2001, None, None],
    )  # fmt: skip
    write(folder, "images", item_id=["c", "b"], image=[b"c's", b"b's"])
    found = list(contents_of(open_data_set(folder, behaviours=False), rows_per_read=rows_per_read))
    assert found == [
        ItemContent("b", title="bee", text="of b", category="B", price=1.5, year=2001, image=b"b's"),
        ItemContent("a", title="ay"),
        ItemContent("c", title="sea", price=0.0, image=b"c's"),
    ]


def test_heads_learn_from_frozen_features_and_towers_from_prepared_items(fixed: Path, tmp_path: Path) -> None:
    builder = builder_of(fixed, tmp_path)
    contents = calibration_items(12)
    rows = builder.features(contents)
    fusion = builder.fusion(SHAPE, rows, seed=1)
    items, towers = builder.items(fusion, rows, contents, TuningConfig())
    assert towers is None and len(items) == 13 and items.has_text_N.tolist() == [False, *[True] * 12]
    learned, towers = builder.items(fusion, rows, contents, TuningConfig(layers="last_blocks", image=False))
    assert towers is not None and towers.image is None and len(learned) == 13
    with torch.no_grad():
        made, frozen = learned.select(torch.arange(13)), items.select(torch.arange(13))
    torch.testing.assert_close(made.text_NR, frozen.text_NR, atol=2e-2, rtol=2e-2)
    assert torch.equal(made.image_NR, frozen.image_NR)
