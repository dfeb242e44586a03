"""Settings of the features of the moment, and their names in order; free of numpy state."""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import Field, model_validator

from trainer.samples.item_facts import FactsConfig

HALF_LIVES = {"1h": 3_600.0, "6h": 21_600.0, "1d": 86_400.0, "7d": 604_800.0}
"""Half-lives of the decayed counts of takes, in seconds."""
RECENT = 5.0
"""Half-life of the weight of an earlier take, in takes."""
_FORMULAS = 1
"""Raised where a formula changes."""


class FeatureConfig(FactsConfig):
    """Which features there are, and how much is kept for them."""

    history_length: int = Field(default=50, ge=1, le=1_000)
    """Most recent takes of a user that features look at, and that pairs of items are counted from."""
    partners: int = Field(default=64, ge=1, le=1_024)
    """Items that an item is counted together with."""
    max_items: int = Field(default=1_000_000, ge=16)
    """Items with counts; where there are more, those longest without a take lose theirs."""
    max_users: int = Field(default=1_000_000, ge=16)
    """Users whose takes are kept to count pairs from; those longest without a take are removed first."""
    remembered_takes: int = Field(default=100_000, ge=0)
    """Newest takes that a drawn exposure can name as its source; an older one is not left out of its features, and
    popularity then tells drawn exposures apart. Where exposures are drawn, at least as many as are taken in
    MIM_TRAINER__DRAW_WINDOW_SECONDS."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if "attributes" in self.attributes:
            raise ValueError(
                '"attributes" is the name of the group of all attributes, and no attribute can have it here'
            )
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise ValueError(f"features would have the same name: {', '.join(sorted(twice))}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features in their order."""
        item = ("takes", *(f"takes {name}" for name in HALF_LIVES), "item idle", "age", "age known")
        user = ("history length", "has history", "user idle")
        category = ("takes", "share", "lift", "popularity", "recent", "newest")
        together = ("together", "together most", "together near", "together nearest", "together lift")
        numbers = (
            name
            for one in self.numbers
            for name in (one, f"{one} known", f"{one} against history", f"{one} away from history", f"{one} of history")
        )
        groups = (f"{one} {what}" for one in self.groups for what in ("shared", "share", "popularity"))
        led_to = ("together", "share", "lift")
        query = tuple(f"{one} {what}" for one in ("query", "trigger") for what in led_to) if self.queries else ()
        return (*user, *item, *(f"category {one}" for one in category), *numbers, *groups, *together, *query)

    @property
    def version(self) -> str:
        """16 hex digits over everything that the value of a feature depends on."""
        parts = [_FORMULAS, self.names, HALF_LIVES, RECENT, self.history_length, self.partners, self.values_per_item]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
