"""The encoder to load and limits of pictures; imports no torch, so that settings load quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]


class EncoderConfig(BaseModel):
    """The encoder of this system, the same in all its processes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bundle: str = "default"
    """Bundle folder; `default` is the packaged one (MiniLM titles, EfficientNet-lite0 pictures, 128 dimensions)."""
    width: int | None = Field(default=None, ge=8)
    """Number of a trained bundle's dimensions to use; must be one of its nested widths."""
    text_model: str | None = None
    """Transformers text model in place of the bundle's: a local folder, or a hub name that is in the local cache. To
    train on it make a bundle (`mimstream bundle make`)."""
    image_model: str | None = None
    """Transformers vision model in place of the bundle's, in the same way."""
    allow_hub_download: bool = False
    """Whether a model that is not in the local cache may be downloaded at start."""
    max_image_bytes: int = Field(default=8_388_608, ge=1_024)
    """Largest encoded picture, in bytes; items with a larger one go to the dead letters."""
    max_image_pixels: int = Field(default=25_000_000, ge=4_096)
    """Largest picture in pixels (width times height), checked in its header before decoding."""
    num_threads: int | None = Field(default=None, ge=1, le=256)
    """Threads of torch in this process; by default the number of cores."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?|mps)$")
    """Device of the towers."""
    precision: Precision = "fp32"
    """Precision of the towers. Less than fp32 is another encoder version: its vectors differ by more than rounding."""
    compile: bool = False
    """Whether torch compiles the towers at the start. Meant for GPUs; on a CPU it takes minutes."""
