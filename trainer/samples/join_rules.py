"""How a click log becomes impressions: every setting that rows depend on, with its window and its join."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from trainer.samples.config import JoinConfig
from trainer.samples.label_join import ImpressionJoin
from trainer.samples.numbering import ItemNumbers
from trainer.samples.window import EventWindow


@dataclass(frozen=True)
class JoinRules:
    """How a log is joined: the same rules over the same log give the same rows."""

    partitions: Collection[int]
    lateness_seconds: float
    duplicate_horizon_seconds: float
    attribution_seconds: float
    history_length: int
    max_users: int
    correction_seconds: float = 0.0
    correction_rows: int = 0
    dropped_by_idle: Collection[tuple[int, int]] = ()
    """Partition and offset of events that were late because their partition was idle."""

    @classmethod
    def of(cls, config: JoinConfig, partitions: Collection[int]) -> JoinRules:
        """The rules of a trainer with this configuration."""
        return cls(partitions, **{name: getattr(config, name) for name in _SETTINGS})

    @classmethod
    def kept(
        cls, settings: Mapping[str, float], partitions: Collection[int], dropped_by_idle: Collection[tuple[int, int]]
    ) -> JoinRules:
        """The rules whose `settings` were stored as numbers. Raises `KeyError` if one is missing."""
        values: dict[str, Any] = {name: settings[name] for name in _SETTINGS}
        values |= {name: int(values[name]) for name in ("history_length", "max_users", "correction_rows")}
        return cls(partitions, **values, dropped_by_idle=dropped_by_idle)

    @property
    def settings(self) -> dict[str, float]:
        """The settings without what belongs to one log; `kept` reads them again."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def window(self) -> EventWindow:
        """An empty window under these rules."""
        return EventWindow(
            self.partitions,
            lateness_seconds=self.lateness_seconds,
            horizon_seconds=self.duplicate_horizon_seconds,
            dropped_by_idle=self.dropped_by_idle,
        )

    def join(self, numbers: ItemNumbers) -> ImpressionJoin:
        """An empty join under these rules; `numbers` gives items their numbers in impressions."""
        return ImpressionJoin(
            numbers,
            history_length=self.history_length,
            attribution_seconds=self.attribution_seconds,
            max_users=self.max_users,
            correction_seconds=self.correction_seconds,
            correction_rows=self.correction_rows,
        )


_SETTINGS = tuple(field.name for field in fields(JoinRules) if field.name not in ("partitions", "dropped_by_idle"))
