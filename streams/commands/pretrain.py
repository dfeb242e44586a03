"""`mimstream pretrain`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from streams.commands.arguments import positive
from streams.runtime.extras import require_package
from streams.runtime.terminal import say
from streams.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="data-set folder (default: the topic `items`)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the bundle here (default: MIM_ENCODERS__FOLDER)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the items (MIM_PRETRAIN__EPOCHS)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Adapt an encoder to items and write its bundle; exit status 1 if the space collapsed."""
    from streams.wiring.encoder_training import run_pretrain  # torch is not needed to print a help text

    if settings.tuning.layers == "lora":
        require_package("peft", "MIM_TUNING__LAYERS=lora")
    started = time.monotonic()
    config = settings.pretrain
    if options.epochs is not None:
        config = config.model_copy(update={"epochs": options.epochs})
    report = run_pretrain(settings, config, options.data, options.out)
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    if options.json:
        print(json.dumps(report))
    else:
        before, after, why = report["title_finds_image_before"], report["title_finds_image"], report["collapse"]
        say(f"{report['data']}: {report['items']:,} items, {report['steps']:,} steps, {report['wall_seconds']:.0f} s")
        print(f"title finds its picture: {before} before, {after} after")
        say(f"NOT RELEASED: {why}" if why else f"{report['encoder_version']} in {report['bundle']}")
    return 1 if report["collapse"] else 0
