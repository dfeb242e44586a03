"""Towers that learn: the same features before, only the named layers change, and a bundle that carries them."""

import numpy as np
import pytest
import torch

from encoders.calibration import calibration_items, calibration_pictures
from encoders.config import EncoderConfig
from encoders.fusion import ItemFusion
from encoders.loading import load_encoder, load_towers
from encoders.trained import TrainingManifest, features_of, read_tower_weights, read_trained, write_trained
from encoders.tuning import TunedItems, TunedNetwork, TunedTowers
from encoders.tuning_config import TuningConfig
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import BundleBuilder, towers_digest
from streams.encoder_training.config import EncoderTrainingConfig
from tests.factories.csft import SMALL, make_csft_trainer, make_fusion, make_numbers, make_pairs
from tests.factories.encoders import flip_byte
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.csft.pretrain import pretrain
from trainer.csft.run import with_padding
from trainer.csft.workers import Workers

ITEMS = 16
TRAINING = TrainingManifest(stage="csft", parent="p", data="d")
HALF = {"atol": 2e-2, "rtol": 2e-2}  # what is kept stands in half precision


@pytest.fixture(scope="module")
def towers():
    return load_towers(EncoderConfig(num_threads=1))


@pytest.fixture(scope="module")
def prepared(towers):
    rows = []
    contents = zip(calibration_items(ITEMS), calibration_pictures(ITEMS, size=128), strict=True)
    for number, (item, picture) in enumerate(contents):
        one = towers.prepare(item)
        rows.append(type(one)(tokens=None if number == 5 else one.tokens, pixels=None if number == 3 else picture))
    return rows


@pytest.fixture
def folders(tmp_path):
    return EncoderTrainingConfig(folder=tmp_path / "encoders", cache_folder=tmp_path / "cache")


@pytest.fixture
def specs(folders):
    return BundleBuilder(EncoderConfig(), folders).specs


def start(towers, prepared, **tuning):
    features = features_of(towers, prepared)
    fusion = make_fusion(features)
    tuned = TunedTowers(towers, TuningConfig(**tuning))
    items = TunedItems(fusion, with_padding(features), iter([prepared[:7], prepared[7:]]), tuned)
    return features, fusion, tuned, items


def trainer_of(fusion, items, tuned):
    numbers = make_numbers(ITEMS)
    pairs = make_pairs(numbers, users=8, takes=4)
    more = {"total_steps": 6, "workers": Workers(), "towers": tuned, "tower_learning_rate": 1e-3}
    return make_csft_trainer(CsftConfig(batch_pairs=16, seed=1), fusion, items, numbers, pairs, **more), pairs


def two_steps(trainer, pairs):
    for begin in (0, 8):
        trainer.step(pairs[begin : begin + 8])


@pytest.mark.parametrize("layers", ["last_blocks", "lora", "all"])
def test_before_learning_the_features_are_the_towers_own(towers, prepared, layers):
    features, fusion, _, items = start(towers, prepared, layers=layers)
    frozen = fusion.prepare(with_padding(features))
    with torch.no_grad():
        made = items.select(torch.arange(len(items)))
    np.testing.assert_allclose(made.text_NR.numpy(), frozen.text_NR.numpy(), **HALF)
    np.testing.assert_allclose(made.image_NR.numpy(), frozen.image_NR.numpy(), **HALF)
    assert not made.image_NR[4].any() and not made.text_NR[6].any()  # what is missing stays missing


@pytest.mark.parametrize(
    ("layers", "learned"),
    [("last_blocks", ("encoder.layer.5.", "_blocks.15.", "_conv_head.")), ("lora", ("encoder.layer.", "_blocks."))],
)
def test_only_the_named_layers_change_and_the_bundle_carries_them(tmp_path, specs, towers, prepared, layers, learned):
    _, fusion, tuned, items = start(towers, prepared, layers=layers)
    trainer, pairs = trainer_of(fusion, items, tuned)
    two_steps(trainer, pairs)
    trainer.finish()
    changes = tuned.changes()
    assert {name.partition(".")[0] for name in changes} == {"text", "image"}
    assert all(name.partition(".")[2].startswith(learned) for name in changes)
    original = {f"text.{n}": v for n, v in towers.text.model.weights.items()}
    original |= {f"image.{n}": v for n, v in towers.image.network.state_dict().items()}
    moved = [name for name, value in changes.items() if not torch.allclose(value, original[name], atol=1e-7)]
    assert len(moved) > len(changes) / 2

    plain = write_trained(tmp_path / "plain", towers=specs, fusion=fusion, training=TRAINING)
    manifest = write_trained(tmp_path / "b", towers=specs, fusion=fusion, training=TRAINING, tower_weights=changes)
    assert manifest.version != plain.version and towers_digest(manifest) != towers_digest(plain)
    found = load_encoder(EncoderConfig(bundle=str(tmp_path / "b"), num_threads=1)).encode(prepared)
    expected = fusion.embed(items).fused_ND.numpy()[1:]
    assert (found * expected).sum(1).min() > 0.999


def test_resuming_goes_on_bit_for_bit_with_towers_that_learn(towers, prepared):
    results = []
    for cut in (False, True):
        _, fusion, tuned, items = start(towers, prepared, layers="last_blocks", text=False)
        trainer, pairs = trainer_of(fusion, items, tuned)
        two_steps(trainer, pairs)
        if cut:
            state = trainer.snapshot()
            _, fusion, tuned, items = start(towers, prepared, layers="last_blocks", text=False)
            trainer, _ = trainer_of(fusion, items, tuned)
            trainer.restore(state)
        trainer.step(pairs[16:24])
        results.append({**fusion.state_dict(), **tuned.changes()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_alignment_reaches_the_towers_too(towers, prepared):
    _, fusion, tuned, items = start(towers, prepared, layers="last_blocks", text=False)
    before = {name: value.clone() for name, value in tuned.changes().items()}
    run = pretrain(PretrainConfig(epochs=2, batch_items=8), fusion, items, towers=tuned, tower_learning_rate=1e-3)
    assert run.steps >= 2 and np.isfinite(run.alignment_loss)
    assert any(not torch.equal(before[name], value) for name, value in tuned.changes().items())


def test_damaged_tower_weights_are_refused(tmp_path, specs, towers, prepared):
    _, fusion, tuned, _ = start(towers, prepared, layers="last_blocks", text=False)
    folder = tmp_path / "b"
    write_trained(folder, towers=specs, fusion=fusion, training=TRAINING, tower_weights=tuned.changes())
    flip_byte(folder / "towers.safetensors", -1)
    manifest, _, _ = read_trained(folder)
    advice = r"towers\.safetensors is damaged.*restore it from a copy, or train it again"
    with pytest.raises(Misconfigured, match=advice):
        read_tower_weights(folder, manifest)


def test_a_network_without_blocks_says_what_to_do_instead():
    with pytest.raises(Misconfigured, match="use lora or all"):
        TunedNetwork(
            torch.nn.Linear(2, 2), lambda network, kept: network(torch.zeros(1, 2)), 2,
            tuning=TuningConfig(layers="last_blocks"), adapters="", per_pass=1,
        )  # fmt: skip


def test_features_of_another_precision_are_kept_apart(folders, specs):
    assert len({towers_digest(specs), towers_digest(specs, "bf16"), towers_digest(specs, "fp16")}) == 3
    assert towers_digest(specs, "fp32") == towers_digest(specs)
    kept = BundleBuilder(EncoderConfig(precision="bf16"), folders).cache
    assert kept.folder.name == towers_digest(specs, "bf16")


def test_a_trained_encoder_of_reduced_precision_has_a_version_of_its_own(tmp_path, towers, specs):
    text_width, image_width = towers.tower_widths
    fusion = ItemFusion(SMALL, text_width=text_width, image_width=image_width)
    manifest = write_trained(tmp_path / "b", towers=specs, fusion=fusion, training=TRAINING)
    reduced = load_encoder(EncoderConfig(bundle=str(tmp_path / "b"), precision="bf16", num_threads=1))
    assert reduced.version == f"{manifest.version}-bf16"
