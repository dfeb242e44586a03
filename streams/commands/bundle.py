"""`mimstream bundle make`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from schemas.errors import Misconfigured
from streams.commands.arguments import positive
from streams.runtime.terminal import say
from streams.settings import Settings

FEWEST_TOKENS, MOST_TOKENS = 8, 8_192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="a bundle of your own text and image models, ready to index and to train")
    model = "transformers model: a folder, or a name in the hub's cache (default: the packaged one)"
    make.add_argument("--text", metavar="PATH", help=model)
    make.add_argument("--image", metavar="PATH", help=model)
    make.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens of a text that are read (default: 128, or all of the model)",
    )
    make.add_argument("--out", type=Path, metavar="DIR", help="write the bundle here (default: MIM_ENCODERS__FOLDER)")
    make.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Make the bundle; one or two minutes."""
    from streams.wiring.encoder_training import run_bundle_make  # torch is not needed to print a help text

    if options.text is None and options.image is None and options.tokens is None:
        raise Misconfigured("name a model with --text or --image; the packaged ones are the bundle `default` already")
    if options.tokens is not None and not FEWEST_TOKENS <= options.tokens <= MOST_TOKENS:
        raise Misconfigured(f"--tokens {options.tokens}: a text is read up to {FEWEST_TOKENS} to {MOST_TOKENS} tokens")
    report = run_bundle_make(settings, options.text, options.image, options.tokens, options.out)
    if options.json:
        print(json.dumps(report))
    else:
        bundle = report["bundle"]
        made = f"{report['dim']} dimensions, {report['tokens']} tokens, pictures of {report['size']} pixels"
        say(f"{report['encoder_version']} in {bundle}: {made}\nuse it: MIM_ENCODER__BUNDLE={bundle}")
    return 0
