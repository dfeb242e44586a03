"""What the scoring benchmark asks about: items, users, requests and a release, the same for system and floor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.manifests import ModelManifest
from streams.bench.score_queries import title_of
from streams.stores.artifacts.registry import Weights, pack_weights, weights_checksum
from streams.stores.vectors.item_index import ItemRow
from trainer.features.config import FeatureConfig
from trainer.networks.ciubm import CiUBM
from trainer.networks.collate import dense_width
from trainer.networks.config import CiUBMConfig, TreesConfig
from trainer.networks.trees import Forest
from trainer.samples.id_hashes import hash_columns

DIM = 128
"""Width of the default encoder's vectors."""
_BEGIN = datetime(2025, 1, 1, tzinfo=UTC)


@cache
def encoder_version() -> str:
    """The default encoder, which encodes searches; items have vectors of chance."""
    return read_bundle(DEFAULT_BUNDLE)[0].version


@dataclass(frozen=True)
class World:
    """Drawn from a seed: the same numbers give the same world."""

    item_ids: list[str]
    vectors_IV: NDArray[np.float32]
    """Unit rows."""
    histories: dict[str, list[str]]
    """Of each user, oldest first."""
    questions: list[tuple[str, list[str]]]
    """User and candidates."""

    def rows(self) -> list[ItemRow]:
        """The items as the center holds them."""
        version = encoder_version()
        return [
            ItemRow(item, version, vector, "", _BEGIN, None, None, None, True, False, 0, number, 0, title_of(number))
            for number, (item, vector) in enumerate(zip(self.item_ids, self.vectors_IV, strict=True))
        ]

    def behaviours(self) -> list[Behaviour]:
        """The takes that make the histories."""
        return [
            Behaviour(
                event_id=f"{user}-{number}",
                kind=BehaviourKind.CLICK,
                user_id=user,
                item_id=item,
                occurred_at=_BEGIN + timedelta(seconds=number),
            )
            for user, history in self.histories.items()
            for number, item in enumerate(history)
        ]

    def bodies(self) -> list[bytes]:
        """The questions as bodies of `POST /v1/score`, a minute after the users' newest takes."""
        newest = max(map(len, self.histories.values()))
        at = int(_BEGIN.timestamp()) + newest + 60
        return [json.dumps({"user_id": user, "item_ids": items, "at": at}).encode() for user, items in self.questions]

    def release(self, history_length: int, *, queries: bool = False) -> tuple[Weights, ModelManifest]:
        """A CiUBM of default size in which every item has its own embedding, with all trees there may be.

        `queries`: one that reads searches, the second release.
        """
        config, features = CiUBMConfig(), FeatureConfig(queries=queries)
        network = CiUBM(config, vector_width=DIM, seed=0, dense_width=dense_width(features))
        for _ in range(config.id_admit_after):
            network.id_table.admit(torch.from_numpy(hash_columns(self.item_ids)))
        network.trees.load(_grown(config.trees, network.numbers_width), config.trees.share)
        weights = network.state_dict()
        checksum = weights_checksum(pack_weights(weights))
        manifest = ModelManifest(
            release_id=f"r{1 + queries:06d}-{checksum[:12]}",
            weights_sha256=checksum,
            encoder_version=encoder_version(),
            dim=DIM,
            features=features.version,
            created_at=_BEGIN,
            rows_trained=0,
            steps=0,
            rows_sha256="",
            offsets={},
            config={
                "model": config.model_dump(mode="json"),
                "features": features.model_dump(mode="json"),
                "history_length": history_length,
            },
        )
        return weights, manifest


def _grown(config: TreesConfig, numbers: int) -> Forest:
    """Trees with a question at every node."""
    rng, inner = np.random.default_rng(0), 2**config.depth - 1
    return Forest(
        rng.integers(numbers, size=(config.count, inner)),
        rng.normal(size=(config.count, inner)).astype(np.float32),
        rng.normal(scale=0.1, size=(config.count, inner + 1)).astype(np.float32),
    )


def draw_world(*, items: int, users: int, history: int, candidates: int, questions: int, seed: int = 0) -> World:
    """Every user has a history of full length; candidates of a question are distinct."""
    rng = np.random.default_rng(seed)
    vectors_IV = rng.normal(size=(items, DIM)).astype(np.float32)
    vectors_IV /= np.linalg.norm(vectors_IV, axis=1, keepdims=True)
    ids = [f"item-{number:08d}" for number in range(items)]
    names = [f"user-{number:06d}" for number in range(users)]
    return World(
        ids,
        vectors_IV,
        {name: [ids[n] for n in rng.integers(items, size=history)] for name in names},
        [
            (names[n % users], [ids[c] for c in rng.choice(items, size=candidates, replace=False)])
            for n in range(questions)
        ],
    )
