"""`mimstream pretrain`."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured
from streams.commands.arguments import positive
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
from streams.runtime.progress import progress_bar
from streams.settings import Settings

if TYPE_CHECKING:
    from encoders.base import ItemContent

log = structlog.get_logger()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="data-set folder (default: the topic `items`)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the bundle here (default: MIM_ENCODERS__FOLDER)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the items (MIM_PRETRAIN__EPOCHS)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Adapt an encoder to items and write its bundle; exit status 1 if the space collapsed."""
    from encoders.trained import TrainingManifest
    from trainer.csft import health
    from trainer.csft.pretrain import pretrain

    started = time.monotonic()
    config = settings.pretrain
    if options.epochs is not None:
        config = config.model_copy(update={"epochs": options.epochs})
    workshop = BundleBuilder(settings.encoder, settings.encoders)
    name, contents, offsets = _items(options, settings)
    if len(contents) < 2:
        raise Misconfigured(f"{name} holds {len(contents)} items, pre-training needs at least 2")
    features = workshop.features(contents)
    fusion = workshop.fusion(settings.fusion, features, seed=config.seed)
    items, towers = workshop.items(fusion, features, contents, settings.tuning)
    before = _geometry(fusion.embed(items))
    with progress_bar("pretrain", config.epochs * max(1, len(contents) // config.batch_items)) as bar:
        trained = pretrain(
            config, fusion, items, on_step=lambda step, total: bar.advance(), towers=towers,
            tower_learning_rate=settings.tuning.learning_rate,
        )  # fmt: skip
    after = _geometry(fusion.embed(items))
    why = health.collapse(after, loss_share=None, cosine_limit=settings.csft.collapse_cosine, loss_limit=1.0)
    report: dict[str, Any] = {
        "stage": "pretrain",
        "data": name,
        "items": len(contents),
        "steps": trained.steps,
        "alignment_loss": trained.alignment_loss,
        "title_finds_image_before": before.title_finds_image,
        "title_finds_image": after.title_finds_image,
        "mean_pairwise_cosine": after.mean_pairwise_cosine,
        "collapse": why,
        "bundle": None,
        "encoder_version": None,
    }
    if why is None:
        manifest = TrainingManifest(
            stage="pretrain",
            parent=workshop.parent,
            data=name,
            offsets=offsets,
            items=len(contents),
            settings=config.model_dump(mode="json"),
            metrics={key: report[key] for key in ("alignment_loss", "title_finds_image", "mean_pairwise_cosine")},
            made_at=datetime.now(UTC),
        )
        place, version = workshop.write(fusion, manifest, options.out, towers=towers)
        report |= {"bundle": str(place), "encoder_version": version}
    else:
        log.error("pretrain.collapsed", why=why, hint="lower MIM_PRETRAIN__LEARNING_RATE; no bundle was written")
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{name}: {len(contents):,} items, {trained.steps:,} steps, {report['wall_seconds']:.0f} s")
        print(f"title finds its picture: {before.title_finds_image} before, {after.title_finds_image} after")
        print(f"NOT RELEASED: {why}" if why else f"{report['encoder_version']} in {report['bundle']}")
    return 1 if why else 0


def _items(options: argparse.Namespace, settings: Settings) -> tuple[str, list[ItemContent], dict[str, dict[int, int]]]:
    if options.data is not None:
        from trainer.datasets.folder import open_data_set

        data = open_data_set(options.data, behaviours=False)
        return data.name, list(contents_of(data)), {}
    from streams.encoder_training.topic_input import read_topics

    read = asyncio.run(
        read_topics(
            settings.kafka, settings.topics, settings.index.field_map, settings.record.field_map, only_items=True
        )
    )
    return settings.topics.prefix, read.contents(), read.offsets


def _geometry(views: Any) -> Any:
    from trainer.csft.health import geometry

    fused, title, image = (rows.numpy()[1:] for rows in (views.fused_ND, views.title_ND, views.image_ND))
    return geometry(fused, title_ND=title, image_ND=image)
