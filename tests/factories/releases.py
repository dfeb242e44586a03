"""Small releases."""

from __future__ import annotations

from datetime import UTC, datetime

import torch

from schemas.manifests import Fence, ModelManifest
from streams.settings import Settings
from streams.stores.artifacts.registry import folder_registry, pack_weights, weights_checksum
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make_weights(number: int) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((64, 8), float(number)), "layer.bias": torch.arange(8.0) + number}


def make_manifest(number: int, *, fence: Fence | None = None, created_at: datetime = NOW) -> ModelManifest:
    checksum = weights_checksum(pack_weights(make_weights(number)))
    return ModelManifest(
        release_id=f"r{number:06d}-{checksum[:12]}",
        weights_sha256=checksum,
        encoder_version="e1",
        dim=8,
        created_at=created_at,
        rows_trained=number,
        steps=number,
        rows_sha256="0" * 64,
        offsets={"behaviours": {0: number}},
        fence=fence,
    )


def release_untrained(settings: Settings, *, encoder_version: str, dim: int) -> str:
    """A CiUBM that has learned nothing, promoted in the model store of `settings`. Returns its id."""
    candidate = OnlineTrainer(TrainerConfig(), encoder_version=encoder_version, dim=dim, partitions=[0]).candidate()
    checksum = weights_checksum(pack_weights(candidate.weights))
    manifest = make_manifest(1, created_at=datetime.now(UTC)).model_copy(
        update={
            "release_id": f"r000001-{checksum[:12]}",
            "weights_sha256": checksum,
            "encoder_version": encoder_version,
            "dim": dim,
            "config": candidate.config,
        }
    )
    store = folder_registry(settings.models)
    store.publish(candidate.weights, manifest)
    store.promote(manifest.release_id, None)
    return manifest.release_id
