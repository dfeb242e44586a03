"""Pre-training from items to a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from encoders.base import ItemContent
from encoders.fusion import Views
from encoders.fusion_config import FusionConfig
from encoders.trained import TrainingManifest
from encoders.tuning_config import TuningConfig
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import BundleBuilder
from streams.runtime.progress import progress_bar
from trainer.csft import health
from trainer.csft.config import PretrainConfig
from trainer.csft.pretrain import pretrain

log = structlog.get_logger()


def pretrain_bundle(
    builder: BundleBuilder,
    name: str,
    contents: Sequence[ItemContent],
    offsets: Mapping[str, dict[int, int]],
    config: PretrainConfig,
    shape: FusionConfig,
    tuning: TuningConfig,
    *,
    collapse_cosine: float,
    out: Path | None,
) -> dict[str, Any]:
    """Adapt the encoder to the items and write the bundle unless the space collapsed. Returns the command's report.

    Raises `Misconfigured` if there are fewer than two items.
    """
    if len(contents) < 2:
        raise Misconfigured(f"{name} holds {len(contents)} items, pre-training needs at least 2")
    features = builder.features(contents)
    fusion = builder.fusion(shape, features, seed=config.seed)
    items, towers = builder.items(fusion, features, contents, tuning)
    before = _geometry(fusion.embed(items))
    with progress_bar("pretrain", config.epochs * max(1, len(contents) // config.batch_items)) as bar:
        trained = pretrain(
            config, fusion, items, on_step=lambda step, total: bar.advance(), towers=towers,
            tower_learning_rate=tuning.learning_rate,
        )  # fmt: skip
    after = _geometry(fusion.embed(items))
    why = health.collapse(after, loss_share=None, cosine_limit=collapse_cosine, loss_limit=1.0)
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
    if why is not None:
        log.error("pretrain.collapsed", why=why, hint="lower MIM_PRETRAIN__LEARNING_RATE; no bundle was written")
        return report
    manifest = TrainingManifest(
        stage="pretrain",
        parent=builder.parent,
        data=name,
        offsets=dict(offsets),
        items=len(contents),
        settings=config.model_dump(mode="json"),
        metrics={key: report[key] for key in ("alignment_loss", "title_finds_image", "mean_pairwise_cosine")},
        made_at=datetime.now(UTC),
    )
    place, version = builder.write(fusion, manifest, out, towers=towers)
    return report | {"bundle": str(place), "encoder_version": version}


def _geometry(views: Views) -> health.Geometry:
    fused, title, image = (rows.numpy()[1:] for rows in (views.fused_ND, views.title_ND, views.image_ND))
    return health.geometry(fused, title_ND=title, image_ND=image)
