"""`mimstream bundle make`: a bundle of one's own models, which loads and which training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders import loading
from encoders.base import ItemContent
from encoders.config import EncoderConfig
from schemas.errors import Misconfigured
from streams.cli import main
from streams.encoder_training.bundle_builder import BundleBuilder
from streams.encoder_training.config import EncoderTrainingConfig
from tests.factories.encoders import write_tokenizer
from tests.factories.small_models import write_distilbert, write_processor, write_vit


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of 77 positions, and a vision model, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("models")
    write_distilbert(folder / "text", max_position_embeddings=77)
    write_vit(folder / "image", patch_size=16)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little calibration, and folders of this test alone."""
    for name, size in (("_FIT_TEXTS", 150), ("_FIT_WORDS", 20), ("_FIT_PICTURES", 60)):
        monkeypatch.setattr(loading, name, size)
    monkeypatch.setenv("MIM_ENCODERS__FOLDER", str(tmp_path / "encoders"))
    monkeypatch.setenv("MIM_ENCODERS__CACHE_FOLDER", str(tmp_path / "cache"))


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bundle", "make", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_own_models_make_a_bundle_that_loads_and_that_training_takes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)  # relative places
    report = made(capsys, "--text", "text", "--image", "image", "--out", str(tmp_path / "mine"))
    assert (report["bundle"], report["dim"], report["tokens"]) == (str(tmp_path / "mine"), 128, 77)
    monkeypatch.chdir(tmp_path)
    config = EncoderConfig(bundle=report["bundle"])
    encoder = loading.load_encoder(config)
    assert encoder.version == report["encoder_version"]
    tokens = encoder.prepare(ItemContent(title="wool coat " * 100)).tokens
    assert tokens is not None and len(tokens) == 77
    builder = BundleBuilder(config, EncoderTrainingConfig(cache_folder=tmp_path / "cache"))
    assert builder.parent == report["encoder_version"]


def test_both_halves_of_a_clip_model_make_a_bundle_of_77_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig  # takes seconds

    folder = tmp_path / "clip"
    words = write_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 104, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=words, max_position_embeddings=77, **shape)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **shape)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    write_processor(folder)
    report = made(capsys, "--text", str(folder), "--image", str(folder))
    assert (report["tokens"], report["size"]) == (77, 32)
    encoder = loading.load_encoder(EncoderConfig(bundle=report["bundle"]))
    assert encoder.encode([encoder.prepare(ItemContent(title="wool coat"))]).shape == (1, 128)


def test_without_a_place_it_lies_among_the_encoders_under_its_version_once(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--text", str(models / "text"), "--image", str(models / "image"), "--tokens", "16")
    reports = [made(capsys, *arguments) for _ in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["tokens"] == 16
    assert [found.name for found in (tmp_path / "encoders").iterdir()] == [reports[0]["encoder_version"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--text or --image"),
        (("--tokens", "7"), "--tokens 7: a text is read up to 8 to 8192 tokens"),
        (("--text", "nobody/never-downloaded-this"), "--text=nobody/never-downloaded-this is neither a folder"),
        (("--text", "{models}/image", "--tokens", "16"), "{models}/image"),
        (("--text", "{models}/text", "--tokens", "78"), "reads 77 tokens, the bundle asks for 78"),
        (("--image", "{models}/image", "--tokens", "16", "--out", "{models}"), "is not empty"),
    ],
)
def test_what_cannot_be_made_is_told_with_the_option(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    given = [argument.replace("{models}", str(models)) for argument in arguments]
    assert main(["bundle", "make", *given]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert told.replace("{models}", str(models)) in error and "Traceback" not in error


def test_training_on_models_that_are_only_named_says_how_to_make_a_bundle(models: Path, tmp_path: Path) -> None:
    config = EncoderConfig(text_model=str(models / "text"))
    with pytest.raises(Misconfigured, match="mimstream bundle make --text PATH --image PATH"):
        BundleBuilder(config, EncoderTrainingConfig(cache_folder=tmp_path))
