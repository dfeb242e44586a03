"""Settings of `pretrain` and `csft`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class EncoderTrainingConfig(BaseModel):
    """Where trained encoders and cached features lie."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "mimstream" / "encoders")
    """New bundles are written below this folder, each under its version."""
    cache_folder: Path = Field(default_factory=lambda: Path.home() / ".cache" / "mimstream")
    """Features of items are kept here by content, so that training again needs no towers."""
