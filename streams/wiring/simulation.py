"""Wiring of `mimstream evaluate --protocol live`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from encoders.base import query_content
from encoders.feature_cache import content_key
from encoders.loading import load_encoder
from schemas.errors import Misconfigured
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
from streams.evaluation.study import stored_vectors
from streams.replay.timeline import Timeline
from streams.settings import Settings
from streams.simulation.click_log import click_log
from streams.simulation.item_vectors import (
    FeatureEncoder,
    VectorsBySecond,
    embedding_records,
    query_records,
    vectors_of,
)
from streams.simulation.run import SimulatedRun, simulate
from streams.training.vector_records import EmbeddingRecord
from streams.wiring.encoder_training import encoder_versions, study_folder
from streams.wiring.training import trainer_maker
from trainer.datasets.exposures import Behaviours, behaviours_of
from trainer.datasets.folder import open_data_set
from trainer.datasets.kinds import kinds_told_apart
from trainer.datasets.queries import Queries, QueryUse, has_searches, without_searches
from trainer.datasets.spans import BehaviourLog
from trainer.offline.encoder_versions import VectorKind
from trainer.offline.protocols import protocol_of

LiveVectors = VectorKind | Literal["bundle"]
"""`bundle`: those of MIM_ENCODER__BUNDLE, which `mimstream index` makes; or a kind of `evaluate`, refreshed."""


@dataclass(frozen=True, eq=False)
class Simulation:
    """A folder that is ready to be learned from."""

    log: BehaviourLog
    behaviours: Behaviours
    timeline: Timeline
    events: int
    """Records of `behaviours` that are learned from."""
    _settings: Settings
    _vectors: LiveVectors

    def run(self, *, seed: int, advance: Callable[[int], None]) -> SimulatedRun:
        """Learn the log once. `seed` is that of an encoder that is trained for it. Raises as `simulate` does."""
        settings = self._settings
        torch.set_num_threads(1)  # as the trainer of a demo: the last digit depends on it
        partitions = settings.topics.partitions
        return simulate(
            trainer_maker(settings),
            islice(click_log(self.timeline, settings.kafka, partitions=partitions), self.events),
            self.embeddings(seed),
            partitions=partitions,
            gate=settings.gate,
            now=self.timeline.now,
            drawn_here=self.log.data.negatives is None,
            advance=advance,
        )

    def embeddings(self, seed: int) -> VectorsBySecond:
        """The vectors, by the second of the log from which on they are there."""
        settings, data = self._settings, self.log.data
        contents = list(contents_of(data, outcomes=settings.index.outcomes))
        hashes = [content_key(content) for content in contents]
        if self._vectors == "bundle":
            features = BundleBuilder(settings.encoder, settings.encoders).features(contents)
            encoder = load_encoder(settings.encoder)
            if not isinstance(encoder, FeatureEncoder):
                raise Misconfigured("MIM_ENCODER__BUNDLE names an encoder without features")
            made = vectors_of(encoder.vectors, features)
            records = list(
                embedding_records(data, made, hashes, version=encoder.version, outcomes=settings.index.outcomes)
            )
            return {0: [*records, *self._queries(encoder)]}
        protocol = protocol_of(self.log, "prequential")
        folder = study_folder(settings, data, "prequential", self._vectors)
        versions = stored_vectors(folder, lambda: encoder_versions(settings, protocol), self._vectors, seed)
        starts = (0, *protocol.encoder_stops[1:])
        searched = self._searched() if settings.trainer.features.queries else []
        by_second: dict[int, list[EmbeddingRecord]] = {}
        for start, vectors_ND in zip(starts, versions.vectors_EIV, strict=True):
            items_ND, queries_ND = np.split(vectors_ND[1:], [len(hashes)])
            of_items = embedding_records(
                data, items_ND, hashes, version=self._vectors, outcomes=settings.index.outcomes
            )
            by_second[start] = [*of_items, *query_records(searched, queries_ND[: len(searched)], version=self._vectors)]
        return by_second

    def _searched(self) -> list[tuple[str | None, bytes | None]]:
        """Words and photo of each distinct query of the log."""
        contents = Queries.of(self.log.data).contents(self.log.data)
        return [(content.title, content.image) for content in contents]

    def _queries(self, encoder: FeatureEncoder) -> Iterator[EmbeddingRecord]:
        """Vectors of what was searched, where rows see it."""
        settings = self._settings
        queries = self._searched() if settings.trainer.features.queries else []
        if not queries:
            return
        contents = [query_content(text, image) for text, image in queries]
        features = BundleBuilder(settings.encoder, settings.encoders).features(contents)
        yield from query_records(queries, vectors_of(encoder.query_vectors, features), version=encoder.version)


def open_simulation(
    settings: Settings,
    folder: Path,
    *,
    neg_type: str,
    seed: int,
    takes: int | None,
    limit: int | None,
    broken: float,
    vectors: LiveVectors,
    queries: QueryUse,
) -> Simulation:
    """A folder as `mimstream replay` would send it: at most `takes` takes of whole users, and the first `limit` events.

    Rows see searches where the folder has them, unless MIM_TRAINER__FEATURES__QUERIES says otherwise; with `queries`
    off neither searches nor trigger items are in the log. Raises `Misconfigured` if it has no interactions.
    """
    data = open_data_set(folder, neg_type=neg_type, attributes=("cold_holdout",))
    if not len(data.interactions):
        raise Misconfigured(f"data set {folder} has no interactions, so there is nothing to evaluate")
    if queries == "off":
        data, settings = without_searches(data), _reading_queries(settings, reads=False)
    elif has_searches(data) and "queries" not in settings.trainer.features.model_fields_set:
        settings = _reading_queries(settings, reads=True)
    kinds = kinds_told_apart(data)
    if kinds and "kinds" not in settings.trainer.model.model_fields_set:
        settings = _with_kinds(settings, kinds)
    behaviours = behaviours_of(data, seed=seed, events=takes, retakes=True)
    timeline = Timeline(data, behaviours, seed, datetime.now(UTC), broken)
    timeline.refuse_field_maps(settings.index.field_map, settings.record.field_map)
    events = timeline.events if limit is None else min(limit, timeline.events)
    return Simulation(BehaviourLog.of(data, folder), behaviours, timeline, events, settings, vectors)


def _with_kinds(settings: Settings, kinds: Sequence[str]) -> Settings:
    model = settings.trainer.model.model_copy(update={"kinds": tuple(kinds)})
    return settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"model": model})})


def _reading_queries(settings: Settings, *, reads: bool) -> Settings:
    features = settings.trainer.features.model_copy(update={"queries": reads})
    return settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"features": features})})
