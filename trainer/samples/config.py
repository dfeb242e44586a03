"""Settings that training rows depend on, whatever network is trained on them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class JoinConfig(BaseModel):
    """How a click log becomes impressions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    history_length: int = Field(default=50, ge=1, le=1_000)
    """Items that a row sees of what its user took last; each stands once, at its newest take."""
    max_users: int = Field(default=1_000_000, ge=1)
    """Users whose history is kept; the one inactive for longest is removed first."""
    lateness_seconds: float = Field(default=60.0, ge=0)
    """How far an event may lie behind its partition's newest one and still count."""
    duplicate_horizon_seconds: float = Field(default=6 * 3600.0, ge=0)
    """How long an event_id is remembered, in event time."""
    duplicate_megabytes: float = Field(default=1024.0, gt=0)
    """Memory for these ids, 24 bytes each; beyond it the oldest are forgotten early (`ids_forgotten` counts)."""
    attribution_seconds: float = Field(default=60.0, ge=0)
    """How long an impression waits for its take, in event time, before it counts as not taken."""
    correction_seconds: float = Field(default=3600.0, ge=0)
    """How long after that a late click still corrects it: the impression is trained on once more, as taken."""
    cart_correction_seconds: float = Field(default=6 * 3600.0, ge=0)
    """Likewise for a cart, which also corrects an impression that was clicked."""
    purchase_correction_seconds: float = Field(default=24 * 3600.0, ge=0)
    """Likewise for a purchase, which also corrects an impression that was clicked or put into the cart."""
    correction_megabytes: float = Field(default=512.0, ge=0)
    """Memory for impressions that a late take can correct, by estimate: 800 bytes each and 16 per take of its history.
    Beyond it the oldest that were not taken are dropped first; 0 switches corrections off."""
    draw_exposures: int = Field(default=0, ge=0, le=50)
    """For a click log without exposures: how many are drawn beside each take that answers none, as not taken, from what
    others took around that moment; the take counts as exposed itself. 0 draws none, and only exposures of the log make
    rows."""
    draw_window_seconds: float = Field(default=3600.0, ge=1)
    """How far before and after the take others' takes are drawn from; training runs that much event time behind."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_retired(cls, values: Any) -> Any:
        for name, instead in _RETIRED.items():
            if isinstance(values, dict) and name in values:
                raise ValueError(f"MIM_TRAINER__{name.upper()} is gone: {instead}")
        return values


_RETIRED = {
    "correction_rows": "what late takes can correct is bounded by CORRECTION_SECONDS, CART_CORRECTION_SECONDS, "
    "PURCHASE_CORRECTION_SECONDS and CORRECTION_MEGABYTES (0: no corrections)",
    "max_pending": "events that wait in memory are bounded by PENDING_MEGABYTES",
}
