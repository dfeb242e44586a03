"""C-SFT from pairs to a bundle, wherever the pairs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from encoders.base import ItemContent
from encoders.features import ItemFeatures
from encoders.fusion import ItemFusion, ItemSource, Views
from encoders.fusion_config import FusionConfig
from encoders.trained import TrainingManifest
from encoders.tuning import TunedTowers
from encoders.tuning_config import TuningConfig
from streams.encoder_training.bundle_builder import BundleBuilder
from streams.runtime.progress import progress_bar
from trainer.csft.config import CsftConfig
from trainer.csft.health import Geometry, collapse
from trainer.csft.pairs import Pair
from trainer.csft.run import CsftRun, learn
from trainer.csft.trainer import CsftReport
from trainer.samples.numbering import FeatureNumbers

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class PairData:
    """A log of behaviours as C-SFT uses it."""

    name: str
    """The data, as reports and manifests name it."""
    source: str
    """The data, as the log line of the start names it."""
    contents: Sequence[ItemContent]
    """Items, in the order of the features."""
    features: ItemFeatures
    fit_features: ItemFeatures
    """The features that a new fusion starts from."""
    numbers: FeatureNumbers
    usable: NDArray[np.bool_]
    """Per number: an item that may be a negative."""
    pairs: Sequence[Pair]
    """All pairs in event-time order."""
    learned: Sequence[Pair]
    """The pairs that are learned from."""
    reports: Callable[[ItemFusion, Views, CsftReport | None], dict[str, Any]]
    """Recall and geometry of a trained fusion's vectors per span, `validation` among them."""
    provenance: dict[str, Any]
    """Fields of the `TrainingManifest` about the data."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Further entries of the command's report."""


def train_bundle(
    builder: BundleBuilder,
    data: PairData,
    config: CsftConfig,
    shape: FusionConfig,
    tuning: TuningConfig,
    *,
    out: Path | None,
    dry_run: bool,
) -> dict[str, Any]:
    """Train a fusion, and the towers if `tuning` says so, and write the bundle unless the space collapsed.

    Returns the report of the command.
    """
    # an SCL encoder has no fusion that learned: both sides stand beside each other
    scl = config.anchor_view == "same" and not config.fused_level
    shape = shape.model_copy(update={"kind": "mean"}) if scl else shape
    fusion = builder.fusion(shape, data.fit_features, seed=config.seed)
    log.info("csft.started", data=data.source, items=len(data.features), pairs=len(data.pairs), parent=builder.parent)
    items, towers = builder.items(fusion, data.features, data.contents, tuning)
    run = _learn(config, fusion, items, data, towers, tuning)
    reports = data.reports(fusion, fusion.embed(items), run.last)
    # with the correction the loss is not comparable to ln(N), and a run without steps has none
    loss_share = run.loss_share if config.log_q_strength == 0 else None
    why = collapse(
        Geometry(**reports["validation"]["geometry"]),
        loss_share=loss_share,
        cosine_limit=config.collapse_cosine,
        loss_limit=config.collapse_loss_share,
    )
    result: dict[str, Any] = {
        "stage": "csft",
        "parent": builder.parent,
        "pairs": run.pairs,
        "steps": run.steps,
        "temperature": run.last.temperature if run.last else None,
        "loss_share": run.loss_share,
        "collapse": why,
        "features_computed": builder.cache.computed,
        "bundle": None,
        "encoder_version": None,
    }
    if why is not None:
        log.error("csft.collapsed", why=why, hint="lower MIM_CSFT__LEARNING_RATE; no bundle was written")
    elif not dry_run:
        manifest = TrainingManifest(
            stage="csft",
            parent=builder.parent,
            data=data.name,
            items=len(data.features),
            pairs=len(data.learned),
            settings=config.model_dump(mode="json"),
            metrics=reports["validation"],
            made_at=datetime.now(UTC),
            **data.provenance,
        )
        place, version = builder.write(fusion, manifest, out, towers=towers)
        result |= {"bundle": str(place), "encoder_version": version}
    return result | {"data": data.name} | reports | data.counts


def _learn(
    config: CsftConfig,
    fusion: ItemFusion,
    items: ItemSource,
    data: PairData,
    towers: TunedTowers | None,
    tuning: TuningConfig,
) -> CsftRun:
    """Train with a progress bar."""
    pairs = data.learned
    with progress_bar("csft", -(-len(pairs) // config.batch_pairs) * config.epochs) as bar:

        def on_step(report: CsftReport, total: int) -> None:
            bar.advance()
            if report.step % 50 == 0:
                levels = {name: round(value, 4) for name, value in report.levels.items()}
                log.info("csft.step", step=report.step, of=total, loss=round(report.loss, 4), **levels)

        return learn(
            config, fusion, items, data.numbers, pairs, usable=data.usable, on_step=on_step, towers=towers,
            tower_learning_rate=tuning.learning_rate,
        )  # fmt: skip
