"""`mimstream evaluate`."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import Misconfigured
from streams.commands.arguments import positive
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.evaluation.figures import Figures
    from streams.evaluation.study import Study, TestScores
    from trainer.datasets.spans import Span


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
    from streams.evaluation.report import markdown, write_reports
    from streams.evaluation.study import run_study
    from streams.runtime.progress import progress_bar
    from trainer.offline import registry

    models = options.models.split(",") if options.models else list(registry.MODELS)
    trials = sum(len(registry.create(name).trials) for name in models)  # an unknown name is refused before any work
    started = time.monotonic()
    study = _open(options, settings)
    with progress_bar("evaluate", trials + len(models) * options.seeds) as bar:
        scores = run_study(study, models, options.seeds, advance=bar.advance)
    document = document_of(study, scores, figures_of(study, scores))
    document["wall_seconds"] = round(time.monotonic() - started, 1)
    write_reports(document, study.out)
    if options.json:
        print(json.dumps(document | {"out": str(study.out)}))
    else:
        print(markdown(document))
        print(f"report: {study.out / 'report.html'}")
    return 0


def document_of(study: Study, scores: list[TestScores], figures: Figures) -> dict[str, Any]:
    """Everything that a study has to say, ready for JSON."""
    protocol, recorded = study.protocol, study.recorded
    models = list(dict.fromkeys(one.model for one in scores))
    spans = {
        "encode": protocol.encode,
        "train": protocol.train,
        "validation": protocol.validation,
        "test": protocol.test,
    }
    return {
        "about": {
            "data": protocol.log.data.name,
            "protocol": protocol.name,
            "vectors": study.kind,
            "versions": len(protocol.encoder_stops),
            "spans": {name: _words(span) for name, span in spans.items()},
            "rows": {
                "train": len(study.train_rows),
                "validation": len(study.validation_rows),
                "test": len(study.test_rows),
                "without_history": recorded.without_history,
            },
            "negatives": recorded.drawn_from,
            "features": list(recorded.rows.dense_names),
        },
        "rows": figures.rows,
        "means": figures.means,
        "paired": figures.paired,
        "calibration": figures.calibration,
        "too_small": figures.too_small,
        "tuning": {name: study.tuning(name) for name in models},
        "cost": [
            {
                "model": one.model,
                "seed": one.seed,
                "fit_seconds": one.fit_seconds,
                "predict_seconds": one.predict_seconds,
            }
            for one in scores
        ],
    }


def _open(options: argparse.Namespace, settings: Settings) -> Study:
    from encoders.feature_cache import content_key
    from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
    from streams.evaluation.study import Study
    from trainer.datasets.folder import open_data_set
    from trainer.datasets.spans import BehaviourLog
    from trainer.offline.columns import read_columns
    from trainer.offline.encoder_versions import FOR_CLICK_MODELS, REFRESH_EPOCHS, WIDE_HEADS, EncoderVersions
    from trainer.offline.protocols import protocol_of
    from trainer.samples.numbering import FeatureNumbers

    data = open_data_set(options.folder, neg_type=options.neg_type, attributes=("cold_holdout",))
    if not len(data.interactions):
        raise Misconfigured(f"data set {options.folder} has no interactions, so there is nothing to evaluate")
    protocol = protocol_of(BehaviourLog.of(data, options.folder), options.protocol)

    def school() -> EncoderVersions:
        contents = list(contents_of(data))
        features = BundleBuilder(settings.encoder, settings.encoders).features(contents)
        numbers = FeatureNumbers(data.item_ids, [content_key(content) for content in contents])
        return EncoderVersions(protocol, features, numbers, settings.csft, settings.fusion, settings.pretrain)

    name = f"{data.name}-{options.protocol}-{options.vectors}"
    return Study(
        read_columns(protocol, options.folder),
        protocol,
        school,
        options.vectors,
        options.out or settings.encoders.cache_folder / "evaluate" / name,
        encoder={
            "bundle": settings.encoder.bundle,
            "csft": settings.csft.model_dump(mode="json") | FOR_CLICK_MODELS | {"refresh_epochs": REFRESH_EPOCHS},
            "fusion": settings.fusion.model_dump(mode="json") | WIDE_HEADS,
            "pretrain": settings.pretrain.model_dump(mode="json"),
        },
    )


def _words(span: Span) -> str:
    """`start` to `stop` in UTC; whole days as dates."""
    start, stop = (datetime.fromtimestamp(second, UTC) for second in (span.start, span.stop))
    if start.time() == stop.time() == datetime.min.time():
        last = datetime.fromtimestamp(span.stop - 1, UTC)
        return f"{start:%d %B %Y}" if last.date() == start.date() else f"{start:%d %B} to {last:%d %B %Y}"
    return f"{start:%d %B %H:%M} to {stop:%d %B %Y %H:%M}"
