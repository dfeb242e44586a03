"""`mimstream evaluate`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from streams.commands.arguments import positive
from streams.runtime.extras import require_package
from streams.runtime.terminal import say
from streams.settings import Settings

NEEDED = {"trees": "lightgbm", "dense-only": "lightgbm", "logistic": "sklearn"}
"""Models that need a package beside the installation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from trainer.offline.encoder_versions import VECTOR_KINDS
    from trainer.offline.protocols import PROTOCOLS

    parser.add_argument("folder", type=Path, metavar="DIR", help="data-set folder")
    parser.add_argument("--models", metavar="NAMES", help="names separated by commas (default: all)")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="time-split",
        help="one encoder, encoders refreshed as time goes on, or cold items alone (default: time-split)",
    )
    parser.add_argument("--vectors", choices=VECTOR_KINDS, default="csft", help="which item vectors models get (csft)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="seeds of encoders and models (3)")
    parser.add_argument("--neg-type", default="pop", help="which sampled negatives count (default: pop)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="scores and reports; an unfinished study there goes on (default: below the cache folder)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run what is missing of the study, write its reports."""
    from streams.evaluation.figures import figures_of
    from streams.evaluation.report import document_of, markdown, write_reports
    from streams.evaluation.study import run_study
    from streams.runtime.progress import progress_bar
    from streams.wiring.encoder_training import open_study
    from trainer.offline import registry

    models = options.models.split(",") if options.models else list(registry.MODELS)
    trials = sum(len(registry.create(name).trials) for name in models)  # an unknown name is refused before any work
    for name in models:
        if name in NEEDED:
            require_package(NEEDED[name], f"model {name!r}")
    started = time.monotonic()
    study = open_study(
        settings, options.folder, protocol_name=options.protocol, vectors=options.vectors, neg_type=options.neg_type,
        out=options.out,
    )  # fmt: skip
    with progress_bar("evaluate", trials + len(models) * options.seeds) as bar:
        scores = run_study(study, models, options.seeds, advance=bar.advance)
    document = document_of(study, scores, figures_of(study, scores))
    document["wall_seconds"] = round(time.monotonic() - started, 1)
    write_reports(document, study.out)
    if options.json:
        print(json.dumps(document | {"out": str(study.out)}))
    else:
        say(markdown(document))
        say(f"report: {study.out / 'report.html'}")
    return 0
