"""An encoder for fault rounds."""

from __future__ import annotations

from pathlib import Path

from encoders.bundle import DEFAULT_BUNDLE, TextSpec, WeightsPlace, read_bundle, write_bundle
from encoders.calibration import calibration_items, calibration_pictures
from encoders.fixed_fusion import FixedFusion, draw_projection
from encoders.image import EfficientNetLite0
from encoders.preprocess import join_text
from encoders.text import TextTower, text_model_sha256
from tests.factories.small_models import write_bert

TOKENS, PIXELS = 32, 64


def small_encoder(folder: Path) -> Path:
    """A bundle that takes a fraction of the work: a text tower of one small layer, and pictures of 64 pixels.

    Loading it needs no transformers, whose import would be most of a worker's restart.
    """
    bundle, text = folder / "bundle", folder / "text"
    if (bundle / "bundle.json").exists():
        return bundle
    text.mkdir(parents=True, exist_ok=True)
    write_bert(text, num_hidden_layers=1, intermediate_size=32)
    towers, _ = read_bundle(DEFAULT_BUNDLE)
    image = towers.image.model_copy(update={"size": PIXELS})
    reading = TextTower(text, max_tokens=TOKENS)
    seeing = EfficientNetLite0(image.weights.resolve(DEFAULT_BUNDLE), sha256=image.weights.sha256, size=PIXELS)
    lines = [reading.tokenize(join_text(item, max_characters=200)) for item in calibration_items(200)]
    write_bundle(
        bundle,
        text=TextSpec(weights=WeightsPlace(path=str(text), sha256=text_model_sha256(text)), max_tokens=TOKENS),
        image=image,
        fusion=FixedFusion(
            draw_projection(reading.features([line for line in lines if line is not None]), 24, seed=0),
            draw_projection(seeing.features(calibration_pictures(32, size=PIXELS)), 8, seed=1),
            image_share=0.2,
        ),
        recipe="drawn, for rounds of faults",
    )
    return bundle
