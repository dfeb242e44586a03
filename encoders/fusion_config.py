"""Shape of the trained part of an encoder; imports no torch, so that settings load quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FusionConfig(BaseModel):
    """Heads F_V and F_L, the fusion of their outputs with publish-time attributes, and the width of the vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    width: int = Field(default=128, ge=8, le=4096)
    """Width of an item embedding."""
    nested_widths: tuple[int, ...] = (64,)
    """Prefixes of the vector that are trained as vectors too, so that a platform may store fewer dimensions."""
    kind: Literal["gated", "tensor", "mean"] = "gated"
    """Fusion of text and picture: a gate per dimension, an outer product, or side by side."""
    tensor_width: int = Field(default=12, ge=2, le=64)
    """Width of each side's projection before the outer product."""
    hidden: int = Field(default=128, ge=0)
    """Width of the hidden layer over text, picture and attributes; 0 leaves it out."""
    text_rank: int = Field(default=192, ge=8)
    """Principal components of the text features that are the head's input."""
    image_rank: int = Field(default=256, ge=8)
    """Principal components of the picture features that are the head's input."""
    category: bool = True
    """Whether the category is an input."""
    category_width: int = Field(default=16, ge=1)
    """Width of a category's hash embedding."""
    category_rows: int = Field(default=2048, ge=16)
    """Rows of the hashed category table; a category is the sum of two of them."""
    year: bool = True
    """Whether the year is an input."""
    price: bool = True
    """Whether the price at first publish is an input."""
    attribute_rows: int = Field(default=8192, ge=0)
    """Rows of the table of hashed values of further attributes (`ItemPublished.attributes`); 0 leaves them out."""
    attribute_width: int = Field(default=32, ge=1)
    """Width of a value's embedding; an item has the sum of its values', over the root of their number."""
    knots: int = Field(default=16, ge=2)
    """Quantiles between which year and price are interpolated."""

    @model_validator(mode="after")
    def _prefixes_fit(self) -> FusionConfig:
        if any(not 0 < nested < self.width for nested in self.nested_widths):
            raise ValueError(f"nested_widths {self.nested_widths} must lie between 0 and width {self.width}")
        return self
