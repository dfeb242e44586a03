"""Wiring of `mimstream pretrain`, `mimstream csft` and `mimstream evaluate`."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from encoders.feature_cache import content_key
from encoders.loading import image_spec_of, make_bundle, text_spec_of
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
from streams.encoder_training.csft import train_bundle
from streams.encoder_training.folder_pairs import folder_pairs
from streams.encoder_training.pretrain import pretrain_bundle
from streams.encoder_training.topic_input import TopicContent, read_topics
from streams.encoder_training.topic_pairs import topic_pairs
from streams.evaluation.study import Study
from streams.settings import Settings
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.datasets.folder import DataSet, open_data_set
from trainer.datasets.queries import Queries, QueryUse, has_searches, reads_searches, without_searches
from trainer.datasets.spans import BehaviourLog
from trainer.offline.columns import read_columns
from trainer.offline.encoder_versions import REFRESH_EPOCHS, EncoderVersions, VectorKind, for_click_models
from trainer.offline.labels import LabelKind
from trainer.offline.protocols import Protocol, ProtocolName, protocol_of
from trainer.samples.numbering import FeatureNumbers


def run_pretrain(settings: Settings, config: PretrainConfig, folder: Path | None, out: Path | None) -> dict[str, Any]:
    """Pre-train on a data-set folder, or else on the topic `items`; the command's report."""
    builder = BundleBuilder(settings.encoder, settings.encoders)
    if folder is not None:
        data = open_data_set(folder, behaviours=False)
        name, contents, offsets = data.name, list(contents_of(data, outcomes=settings.index.outcomes)), {}
    else:
        read = _read_topics(settings, only_items=True)
        name, contents, offsets = settings.topics.prefix, read.contents(), read.offsets
    return pretrain_bundle(
        builder, name, contents, offsets, config, settings.fusion, settings.tuning,
        collapse_cosine=settings.csft.collapse_cosine, out=out,
    )  # fmt: skip


def run_csft(
    settings: Settings, config: CsftConfig, folder: Path | None, out: Path | None, *, with_test: bool, dry_run: bool
) -> dict[str, Any]:
    """Train on a data-set folder, or else on the topics; the command's report."""
    if folder is not None:
        behaviours = BehaviourLog.of(open_data_set(folder, attributes=("cold_holdout",)), folder)
        builder = BundleBuilder(settings.encoder, settings.encoders)
        data = folder_pairs(behaviours, builder, config, with_test=with_test, outcomes=settings.index.outcomes)
    else:
        read = _read_topics(settings)
        builder = BundleBuilder(settings.encoder, settings.encoders)
        data = topic_pairs(read, builder.features, config, name=settings.topics.prefix, log=settings.trainer)
    return train_bundle(builder, data, config, settings.fusion, settings.tuning, out=out, dry_run=dry_run)


def run_bundle_make(
    settings: Settings, text: str | None, image: str | None, tokens: int | None, out: Path | None
) -> dict[str, Any]:
    """Make a bundle of two backbones, the packaged one for each that is not named; the command's report.

    Raises `Misconfigured` if a backbone cannot be used, or `out` is in use.
    """
    packaged, _ = read_bundle(DEFAULT_BUNDLE)
    text_spec = packaged.text
    if text is not None:
        text_spec = text_spec_of(text, tokens, settings.encoder, named_by="--text")
    elif tokens is not None:
        text_spec = packaged.text.model_copy(update={"max_tokens": tokens})
    image_spec = packaged.image if image is None else image_spec_of(image, settings.encoder, named_by="--image")
    try:
        if out is not None:
            place, manifest = out, make_bundle(out, text=text_spec, image=image_spec, config=settings.encoder)
        else:
            settings.encoders.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="new-", dir=settings.encoders.folder) as folder:
                made = Path(folder) / "bundle"
                manifest = make_bundle(made, text=text_spec, image=image_spec, config=settings.encoder)
                place = settings.encoders.folder / manifest.version
                if not place.exists():
                    made.rename(place)
    except FileExistsError as error:
        raise Misconfigured(f"--out: {error}") from None
    return {
        "encoder_version": manifest.version,
        "bundle": str(place),
        "dim": manifest.dim,
        "tokens": text_spec.max_tokens,
        "size": image_spec.size,
    }


def open_study(
    settings: Settings,
    folder: Path,
    *,
    protocol_name: ProtocolName,
    labels: LabelKind,
    vectors: VectorKind,
    neg_type: str,
    queries: QueryUse,
    out: Path | None,
) -> Study:
    """A study of a data-set folder. MIM_TRAINER__FEATURES__QUERIES=false is as `queries` off.

    Raises `Misconfigured` if it has no interactions, or not the ones to judge by.
    """
    data = open_data_set(folder, neg_type=neg_type, attributes=("cold_holdout",))
    if not len(data.interactions):
        raise Misconfigured(f"data set {folder} has no interactions, so there is nothing to evaluate")
    features = settings.trainer.features
    if queries == "off" or ("queries" in features.model_fields_set and not features.queries):
        data, features = without_searches(data), features.model_copy(update={"queries": False})
    protocol = protocol_of(BehaviourLog.of(data, folder), protocol_name)
    csft, fusion = for_click_models(settings.csft, settings.fusion)
    return Study(
        read_columns(
            protocol,
            folder,
            labels=labels,
            live=features,
            outcomes=settings.index.outcomes,
            step_rows=settings.trainer.batch_rows,
        ),
        protocol,
        lambda: encoder_versions(settings, protocol),
        vectors,
        out or study_folder(settings, data, protocol_name, vectors, labels),
        encoder={
            "bundle": settings.encoder.bundle,
            "csft": csft.model_dump(mode="json") | {"refresh_epochs": REFRESH_EPOCHS},
            "fusion": fusion.model_dump(mode="json"),
            "pretrain": settings.pretrain.model_dump(mode="json"),
        },
    )


def study_folder(
    settings: Settings, data: DataSet, protocol: ProtocolName, vectors: VectorKind, labels: LabelKind = "takes"
) -> Path:
    """Where a study of a data set is kept, if the user names no folder; what reads searches has a place of its own."""
    judged_by = "" if labels == "takes" else f"-{labels}"
    read = "-searches" if reads_searches(data) else ""
    return settings.encoders.cache_folder / "evaluate" / f"{data.name}-{protocol}-{vectors}{judged_by}{read}"


def encoder_versions(settings: Settings, protocol: Protocol) -> EncoderVersions:
    """The encoder versions of a folder's protocol, over the cache of tower features."""
    data = protocol.log.data
    contents = list(contents_of(data, outcomes=settings.index.outcomes))
    numbers = FeatureNumbers(data.item_ids, [content_key(content) for content in contents])
    queries = Queries.of(data) if has_searches(data) else None
    contents += [] if queries is None else queries.contents(data)
    features = BundleBuilder(settings.encoder, settings.encoders).features(contents)
    return EncoderVersions(protocol, features, numbers, settings.csft, settings.fusion, settings.pretrain, queries)


def _read_topics(settings: Settings, *, only_items: bool = False) -> TopicContent:
    fields = settings.index.field_map, settings.record.field_map
    reading = read_topics(
        settings.kafka, settings.topics, *fields, only_items=only_items, outcomes=settings.index.outcomes
    )
    return asyncio.run(reading)
