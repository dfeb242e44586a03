"""`mimstream csft`."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from streams.commands.arguments import positive, share
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
from streams.runtime.progress import progress_bar
from streams.settings import Settings

if TYPE_CHECKING:
    from encoders.fusion import ItemFusion, ItemSource
    from encoders.tuning import TunedTowers
    from encoders.tuning_config import TuningConfig
    from trainer.csft.config import CsftConfig
    from trainer.csft.run import CsftRun
    from trainer.csft.trainer import CsftReport

log = structlog.get_logger()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="data-set folder (default: the topics)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the bundle here (default: MIM_ENCODERS__FOLDER)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the pairs (MIM_CSFT__EPOCHS)")
    parser.add_argument("--log-q", type=share, metavar="SHARE", help="sampling correction (MIM_CSFT__LOG_Q_STRENGTH)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every random choice (MIM_CSFT__SEED)")
    parser.add_argument("--scl", action="store_true", help="SCL of Taobao display instead of C-SFT")
    parser.add_argument("--test", action="store_true", help="also report the folder's test span (look once)")
    parser.add_argument("--dry-run", action="store_true", help="train and report, write no bundle")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train an encoder and write its bundle; exit status 1 if the space collapsed."""
    config = configured(options, settings.csft)
    started = time.monotonic()
    report = _from_folder(options, settings, config) if options.data else _from_topics(options, settings, config)
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 1 if report["collapse"] else 0


def configured(options: argparse.Namespace, config: CsftConfig) -> CsftConfig:
    """Settings with the options on top."""
    given = {"epochs": options.epochs, "log_q_strength": options.log_q, "seed": options.seed}
    changed = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    return changed.as_scl() if options.scl else changed


def _from_folder(options: argparse.Namespace, settings: Settings, config: CsftConfig) -> dict[str, Any]:
    import numpy as np

    from encoders.feature_cache import content_key
    from trainer.datasets.folder import open_data_set
    from trainer.datasets.spans import BehaviourLog
    from trainer.offline import encoder_report
    from trainer.samples.numbering import FeatureNumbers

    data = open_data_set(options.data, attributes=("cold_holdout",))
    behaviours = BehaviourLog.of(data, options.data)
    workshop = BundleBuilder(settings.encoder, settings.encoders)
    contents = list(contents_of(data))
    features = workshop.features(contents)
    numbers = FeatureNumbers(data.item_ids, [content_key(content) for content in contents])
    pairs = behaviours.pairs(behaviours.learn, numbers, history_length=config.history_length, seed=config.seed)
    known = behaviours.published(behaviours.learn)
    fusion = workshop.fusion(_shape(settings, config), features.take(np.flatnonzero(known[1:])), seed=config.seed)
    log.info("csft.started", data=data.name, items=len(contents), pairs=len(pairs), parent=workshop.parent)
    items, towers = workshop.items(fusion, features, contents, settings.tuning)
    trained = learn_pairs(
        config,
        fusion,
        items,
        numbers,
        pairs,
        usable=known & ~behaviours.held_out,
        towers=towers,
        tuning=settings.tuning,
    )
    views = fusion.embed(items)
    spans = {"validation": behaviours.validation} | ({"test": behaviours.test} if options.test else {})
    report: dict[str, Any] = {"data": data.name}
    for name, span in spans.items():
        questions = encoder_report.questions_of(behaviours, span)
        geometry = encoder_report.geometry_of(views, questions)
        found = {
            "popularity": encoder_report.popularity(behaviours, span, questions),
            "frozen": encoder_report.recalls(encoder_report.frozen_vectors(features), behaviours, span, questions),
            "trained": encoder_report.recalls(views.fused_ND.numpy(), behaviours, span, questions),
            "geometry": encoder_report.geometry_dict(geometry),
        }
        if trained.last is not None:
            found["trained_with_popularity"] = encoder_report.recalls_with_popularity(
                views.fused_ND.numpy(), behaviours, span, questions,
                temperature=trained.last.temperature, strength=config.log_q_strength,
            )  # fmt: skip
        for width in fusion.config.nested_widths[:1]:
            prefix = encoder_report.unit_rows(views.fused_ND.numpy()[:, :width])
            found["trained_nested"] = encoder_report.recalls(prefix, behaviours, span, questions)
        report[name] = found
    span = behaviours.learn
    about = {
        "data": data.name,
        "first_event_at": datetime.fromtimestamp(span.start, UTC),
        "last_event_at": datetime.fromtimestamp(span.stop - 1, UTC),
        "items": len(contents),
        "pairs": len(pairs),
        "metrics": report["validation"],
    }
    finished = _finish(
        options, workshop, config, fusion, trained, geometry_of=report["validation"], about=about, towers=towers
    )
    return finished | report


def _from_topics(options: argparse.Namespace, settings: Settings, config: CsftConfig) -> dict[str, Any]:
    from streams.encoder_training.topic_input import read_topics
    from streams.encoder_training.topic_pairs import TopicLog

    read = asyncio.run(
        read_topics(settings.kafka, settings.topics, settings.index.field_map, settings.record.field_map)
    )
    workshop = BundleBuilder(settings.encoder, settings.encoders)
    topics = TopicLog.of(read, workshop, config, lateness_seconds=settings.trainer.lateness_seconds,
                         attribution_seconds=settings.trainer.attribution_seconds)  # fmt: skip
    fusion = workshop.fusion(_shape(settings, config), topics.features, seed=config.seed)
    log.info("csft.started", data="topics", items=len(topics.features), pairs=len(topics.pairs), parent=workshop.parent)
    items, towers = workshop.items(fusion, topics.features, topics.contents, settings.tuning)
    trained = learn_pairs(
        config, fusion, items, topics.numbers, topics.learned, usable=topics.usable, towers=towers,
        tuning=settings.tuning,
    )  # fmt: skip
    found = topics.report(fusion.embed(items))
    about = {
        "data": settings.topics.prefix,
        "first_event_at": topics.first_event_at,
        "last_event_at": topics.last_event_at,
        "offsets": read.offsets,
        "cluster_id": read.cluster_id,
        "items": len(topics.features),
        "pairs": len(topics.learned),
        "metrics": found,
    }
    finished = _finish(options, workshop, config, fusion, trained, geometry_of=found, about=about, towers=towers)
    return finished | {
        "data": settings.topics.prefix,
        "validation": found,
        "offsets": read.offsets,
        "behaviours": read.behaviours_read,
        "broken": read.broken,
        "erased": read.erased,
    }


def learn_pairs(
    config: CsftConfig,
    fusion: ItemFusion,
    items: ItemSource,
    numbers: Any,
    pairs: list[Any],
    *,
    usable: Any,
    towers: TunedTowers | None,
    tuning: TuningConfig,
) -> CsftRun:
    """Train with a progress bar."""
    from trainer.csft.run import learn

    steps = -(-len(pairs) // config.batch_pairs) * config.epochs
    with progress_bar("csft", steps) as bar:

        def on_step(report: CsftReport, total: int) -> None:
            bar.advance()
            if report.step % 50 == 0:
                log.info("csft.step", step=report.step, of=total, loss=round(report.loss, 4), **_rounded(report.levels))

        return learn(
            config, fusion, items, numbers, pairs, usable=usable, on_step=on_step, towers=towers,
            tower_learning_rate=tuning.learning_rate,
        )  # fmt: skip


def _finish(
    options: argparse.Namespace,
    workshop: BundleBuilder,
    config: CsftConfig,
    fusion: ItemFusion,
    trained: CsftRun,
    *,
    geometry_of: dict[str, Any],
    about: dict[str, Any],
    towers: TunedTowers | None,
) -> dict[str, Any]:
    from encoders.trained import TrainingManifest
    from trainer.csft.health import Geometry, collapse

    # with the correction the loss is not comparable to ln(N), and a run without steps has none
    loss_share = trained.loss_share if config.log_q_strength == 0 else None
    why = collapse(
        Geometry(**geometry_of["geometry"]),
        loss_share=loss_share,
        cosine_limit=config.collapse_cosine,
        loss_limit=config.collapse_loss_share,
    )
    result: dict[str, Any] = {
        "stage": "csft",
        "parent": workshop.parent,
        "pairs": trained.pairs,
        "steps": trained.steps,
        "temperature": trained.last.temperature if trained.last else None,
        "loss_share": trained.loss_share,
        "collapse": why,
        "features_computed": workshop.cache.computed,
        "bundle": None,
        "encoder_version": None,
    }
    if why is not None:
        log.error("csft.collapsed", why=why, hint="lower MIM_CSFT__LEARNING_RATE; no bundle was written")
        return result
    if not options.dry_run:
        manifest = TrainingManifest(
            stage="csft",
            parent=workshop.parent,
            settings=config.model_dump(mode="json"),
            made_at=datetime.now(UTC),
            **about,
        )
        place, version = workshop.write(fusion, manifest, options.out, towers=towers)
        result |= {"bundle": str(place), "encoder_version": version}
    return result


def _shape(settings: Settings, config: CsftConfig) -> Any:
    # an SCL encoder has no fusion that learned: both sides stand beside each other
    scl = config.anchor_view == "same" and not config.fused_level
    return settings.fusion.model_copy(update={"kind": "mean"}) if scl else settings.fusion


def _rounded(levels: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in levels.items()}


def _print(report: dict[str, Any]) -> None:
    from trainer.offline.encoder_report import table

    print(f"{report['data']}: {report['pairs']:,} pairs, {report['steps']:,} steps, {report['wall_seconds']:.0f} s")
    for span in ("validation", "test"):
        if span in report:
            print(f"\n{span}\n{table(report[span])}")
            geometry = report[span]["geometry"]
            print(
                f"mean pairwise cosine {geometry['mean_pairwise_cosine']:.3f}, "
                f"effective rank {geometry['effective_rank']:.0f}, uniformity {geometry['uniformity']:.2f}"
            )
    if report["collapse"]:
        print(f"\nNOT RELEASED: {report['collapse']}")
    elif report["bundle"]:
        print(f"\n{report['encoder_version']} in {report['bundle']}\nuse it: MIM_ENCODER__BUNDLE={report['bundle']}")
