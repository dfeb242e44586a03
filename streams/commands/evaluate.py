"""`mimstream evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from schemas.errors import Misconfigured
from streams.commands.arguments import positive, share
from streams.runtime.extras import require_package
from streams.runtime.terminal import say
from streams.settings import Settings

NEEDED = {"logistic": "sklearn", "tfidf-query": "sklearn"}
"""Models that need a package beside the installation."""
LIVE = "live"
_ELSEWHERE, _LIVE_ALONE = ("models", "seeds", "labels"), ("seed", "events", "limit", "broken", "against")
"""Options that go with the other protocols alone, and with the live one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from trainer.datasets.queries import QUERY_USES
    from trainer.offline.encoder_versions import VECTOR_KINDS
    from trainer.offline.labels import LABEL_KINDS
    from trainer.offline.protocols import PROTOCOLS

    parser.add_argument("folder", type=Path, metavar="DIR", help="data-set folder")
    parser.add_argument("--models", metavar="NAMES", help="names separated by commas (default: all)")
    parser.add_argument(
        "--protocol",
        choices=[*PROTOCOLS, LIVE],
        default="time-split",
        help="one encoder, encoders refreshed as time goes on, cold items alone (default: time-split), or what "
        "`mimstream train` learns in one pass from what `mimstream replay` sends",
    )
    parser.add_argument(
        "--labels",
        choices=LABEL_KINDS,
        help="what models are judged by: takes against exposures (default), or the rated takes alone, each by whether "
        "it was rated above the mean of what its user rated before",
    )
    parser.add_argument(
        "--vectors",
        choices=[*VECTOR_KINDS, "bundle"],
        help="which item vectors models get (csft; with --protocol live: bundle, those of MIM_ENCODER__BUNDLE)",
    )
    parser.add_argument(
        "--queries",
        choices=QUERY_USES,
        default="auto",
        help="auto: models see what was searched, and the item looked at just before, where the folder says it and "
        "MIM_TRAINER__FEATURES__QUERIES does not say false (default); off: as if it said neither, in the replayed log "
        "of --protocol live too",
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds of encoders and models (3)")
    parser.add_argument("--neg-type", default="pop", help="which sampled negatives count (default: pop)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="scores and reports; an unfinished study there goes on (default: below the cache folder)",
    )
    live = parser.add_argument_group("with --protocol live")
    live.add_argument("--seed", type=int, help="seed of everything that a replay draws (default: 0)")
    live.add_argument("--events", type=positive, metavar="N", help="keep at most N takes, sampling users whole")
    live.add_argument("--limit", type=positive, metavar="N", help="end after the first N events of the click log")
    live.add_argument("--broken", type=share, metavar="SHARE", help="share of broken events to mix in")
    live.add_argument("--against", type=Path, metavar="DIR", help="compare with the scores in the --out of another run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run what is missing of the study, write its reports."""
    for name in _ELSEWHERE if options.protocol == LIVE else _LIVE_ALONE:
        if getattr(options, name) is not None:
            raise Misconfigured(f"--{name} does not go with --protocol {options.protocol}: nothing there looks at it")
    if options.protocol == LIVE:
        return _run_live(options, settings)
    if options.vectors == "bundle":
        raise Misconfigured("--vectors bundle goes with --protocol live: other protocols train encoders of their own")
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
    seeds = options.seeds or 3
    study = open_study(
        settings, options.folder, protocol_name=options.protocol, labels=options.labels or "takes",
        vectors=options.vectors or "csft", neg_type=options.neg_type, queries=options.queries, out=options.out,
    )  # fmt: skip
    with progress_bar("evaluate", trials + len(models) * seeds) as bar:
        scores = run_study(study, models, seeds, advance=bar.advance)
    document = document_of(study, scores, figures_of(study, scores))
    document["wall_seconds"] = round(time.monotonic() - started, 1)
    write_reports(document, study.out)
    if options.json:
        print(json.dumps(document | {"out": str(study.out)}))
    else:
        say(markdown(document))
        say(f"report: {study.out / 'report.html'}")
    return 0


def _run_live(options: argparse.Namespace, settings: Settings) -> int:
    """Learn the folder as the live system does, and print what its models reach."""
    from streams.runtime.progress import progress_bar
    from streams.simulation.report import document_of, read_run, text_of, write_run
    from streams.wiring.simulation import open_simulation

    seed, other = options.seed or 0, None if options.against is None else read_run(options.against)
    simulation = open_simulation(
        settings, options.folder, neg_type=options.neg_type, seed=seed, takes=options.events,
        limit=options.limit, broken=options.broken or 0.0, vectors=options.vectors or "bundle",
        queries=options.queries,
    )  # fmt: skip
    started = time.monotonic()
    with progress_bar("evaluate", simulation.events) as bar:
        result = simulation.run(seed=seed, advance=bar.advance)
    document = document_of(result, simulation.log, other=other, seed=seed)
    document["wall_seconds"] = round(time.monotonic() - started, 1)
    if options.out is not None:
        write_run(result, document, options.out)
    if options.json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        say(text_of(document))
    return 0
