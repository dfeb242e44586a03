"""Small releases."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from schemas.manifests import Fence, ModelManifest
from streams.settings import Settings
from streams.stores.artifacts.registry import ModelRegistry, folder_registry, pack_weights, weights_checksum
from trainer.features.config import FeatureConfig
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Weights = Mapping[str, torch.Tensor]


def make_weights(number: int) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((64, 8), float(number)), "layer.bias": torch.arange(8.0) + number}


def make_manifest(number: int, *, weights: Weights | None = None, **changes: Any) -> ModelManifest:
    checksum = weights_checksum(pack_weights(make_weights(number) if weights is None else weights))
    return ModelManifest(
        release_id=f"r{number:06d}-{checksum[:12]}",
        weights_sha256=checksum,
        encoder_version="e1",
        dim=8,
        features=FeatureConfig().version,
        created_at=NOW,
        rows_trained=number,
        steps=number,
        rows_sha256="0" * 64,
        offsets={"behaviours": {0: number}},
    ).model_copy(update=changes)


def publish(store: ModelRegistry, number: int, *, weights: Weights | None = None, **changes: Any) -> str:
    """Store a release that is not current. Returns its id."""
    weights = make_weights(number) if weights is None else weights
    manifest = make_manifest(number, weights=weights, **changes)
    store.publish(weights, manifest)
    return manifest.release_id


def release(store: ModelRegistry, number: int, fence: Fence | None = None, **made: Any) -> str:
    """Publish a release and promote it. Returns its id."""
    release_id = publish(store, number, fence=fence, **made)
    store.promote(release_id, fence)
    return release_id


def release_untrained(
    settings: Settings, number: int = 1, *, encoder_version: str, dim: int, damage: bool = False
) -> str:
    """Promote a CiUBM that has learned nothing, told apart by one weight, in the model store of `settings`."""
    candidate = OnlineTrainer(TrainerConfig(), encoder_version=encoder_version, dim=dim, partitions=[0]).candidate()
    weights = dict(candidate.weights)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    weights[name] = weights[name] + number * 1e-3
    store, made = folder_registry(settings.models), {"encoder_version": encoder_version, "dim": dim}
    now, config = datetime.now(UTC), candidate.config
    release_id = publish(store, number, weights=weights, created_at=now, config=config, **made)
    if damage:
        (settings.models.folder / "releases" / release_id / "model.safetensors").write_bytes(b"nothing of the kind")
    store.promote(release_id, None)
    return release_id


def current_id(store: ModelRegistry) -> str | None:
    """Id of the release that is served."""
    pointer = store.current()
    return None if pointer is None else pointer.release_id
