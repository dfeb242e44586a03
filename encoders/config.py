"""Which encoder to load and how far to trust pictures. Light to import: settings read it, torch stays out."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]


class EncoderConfig(BaseModel):
    """The encoder of this system. All processes of a system must name the same one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bundle: str = "default"
    """Bundle folder; `default` is the one that ships (MiniLM titles, EfficientNet-lite0 pictures, 128 dimensions)."""
    width: int | None = Field(default=None, ge=8)
    """Keep this many of a trained bundle's dimensions; it must be one of the nested widths that it was trained for."""
    text_model: str | None = None
    """Transformers text model in place of the bundle's: a local folder, or a hub name that is in the local cache."""
    image_model: str | None = None
    """Transformers vision model in place of the bundle's: a local folder, or a hub name that is in the local cache."""
    allow_hub_download: bool = False
    """Whether a hub name that is not in the local cache may be downloaded at start."""
    max_image_bytes: int = Field(default=8_388_608, ge=1_024)
    """Largest encoded picture, in bytes; a larger one is a dead letter."""
    max_image_pixels: int = Field(default=25_000_000, ge=4_096)
    """Largest picture in pixels (width times height), by its header, before anything is decoded."""
    num_threads: int | None = Field(default=None, ge=1, le=256)
    """Threads that torch may use in this process; by default as many as there are cores."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?|mps)$")
    """Where the towers run."""
    precision: Precision = "fp32"
    """Arithmetic of the towers. Less than fp32 is another encoder version: its vectors differ by more than rounding."""
    compile: bool = False
    """Whether torch compiles the towers at the start. Meant for GPUs; on a CPU compiling takes minutes."""
