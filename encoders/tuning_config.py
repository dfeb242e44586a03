"""Which layers of the towers are trained; imports no torch, so that settings load quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TuningConfig(BaseModel):
    """Which layers of the towers are trained, in `pretrain` and in `csft`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    layers: Literal["heads", "last_blocks", "lora", "all"] = "heads"
    """Heads and fusion over cached features; or the towers' last blocks too; or low-rank adapters in all blocks (needs
    the extra `lora`), merged into the weights at the end; or everything."""
    blocks: int = Field(default=1, ge=1)
    """Number of blocks at the end of each tower that are trained, with `last_blocks`."""
    text: bool = True
    """Whether the text tower is trained."""
    image: bool = True
    """Whether the image tower is trained."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1e-2)
    """Largest step size of tower weights; heads and fusion keep their own."""
    lora_rank: int = Field(default=8, ge=1, le=256)
    """Rank of the adapters, with `lora`."""
