"""How a click log becomes impressions: every setting that rows depend on, with its window and its join."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from schemas.behaviours import BehaviourKind
from trainer.samples.config import JoinConfig
from trainer.samples.corrections import CorrectableRows
from trainer.samples.exposure_draws import DrawnBefore, ExposureDraws
from trainer.samples.label_join import ImpressionJoin
from trainer.samples.numbering import ItemNumbers
from trainer.samples.recent_ids import BYTES_PER_ID
from trainer.samples.searches import SearchUse
from trainer.samples.window import EventWindow

_NO_LIMIT = float(1 << 53)


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
    cart_correction_seconds: float = 0.0
    purchase_correction_seconds: float = 0.0
    correction_megabytes: float = 0.0
    correction_rows: float = _NO_LIMIT
    """Rows that can be corrected at most, a rule of earlier builds."""
    duplicate_megabytes: float = _NO_LIMIT
    draw_exposures: float = 0
    draw_window_seconds: float = 0.0
    upgrades: bool = True
    """Whether a take of a more reliable kind corrects an impression that was taken; earlier builds had no such rule."""
    items_once: bool = True
    """Whether a history holds an item once; those of earlier builds held every take."""
    dropped_by_idle: Collection[tuple[int, int]] = ()
    """Partition and offset of events that were late because their partition was idle."""

    @classmethod
    def of(cls, config: JoinConfig, partitions: Collection[int]) -> JoinRules:
        """The rules of a trainer with this configuration."""
        return cls(partitions, **{name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)})

    @classmethod
    def kept(
        cls, settings: Mapping[str, float], partitions: Collection[int], dropped_by_idle: Collection[tuple[int, int]]
    ) -> JoinRules:
        """The rules whose `settings` were stored as numbers. Raises `KeyError` if one is missing.

        Those of an earlier build have one window for all kinds, and a bound by rows.
        """
        values: dict[str, Any] = dict(settings)
        if "upgrades" not in values:
            one = values["correction_seconds"]
            values |= {"cart_correction_seconds": one, "purchase_correction_seconds": one}
            values |= {"correction_megabytes": _NO_LIMIT if values["correction_rows"] else 0.0, "upgrades": False}
        # an earlier build drew nothing, kept all ids of its horizon, and every take in histories
        earlier = {"draw_exposures": 0, "draw_window_seconds": 0.0, "duplicate_megabytes": _NO_LIMIT}
        values = earlier | {"items_once": False} | values
        values = {name: values[name] for name in _SETTINGS}
        values |= {name: int(values[name]) for name in ("history_length", "max_users")}
        values |= {name: bool(values[name]) for name in ("upgrades", "items_once")}
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
            most_ids=int(1e6 * self.duplicate_megabytes / BYTES_PER_ID),
            hold_seconds=int(self.draw_window_seconds) if self.draw_exposures else 0,
        )

    def join(
        self,
        numbers: ItemNumbers,
        *,
        drawn_before: DrawnBefore | None = None,
        searches: SearchUse = SearchUse.NOTHING,
    ) -> ImpressionJoin:
        """An empty join under these rules; `numbers` gives items their numbers in impressions.

        Exposures are drawn, if any, or are those `drawn_before`.
        """
        draws = ExposureDraws(per_take=int(self.draw_exposures), window_seconds=self.draw_window_seconds)
        return ImpressionJoin(
            numbers,
            history_length=self.history_length,
            attribution_seconds=self.attribution_seconds,
            max_users=self.max_users,
            corrections=self.corrections(),
            draws=(drawn_before or draws) if self.draw_exposures else None,
            items_once=self.items_once,
            searches=searches,
        )

    @property
    def take_seconds(self) -> dict[BehaviourKind, float]:
        """How long after its exposure a take of each kind counts where late takes correct, in event time."""
        return {
            BehaviourKind.CLICK: self.attribution_seconds + self.correction_seconds,
            BehaviourKind.CART: self.attribution_seconds + self.cart_correction_seconds,
            BehaviourKind.PURCHASE: self.attribution_seconds + self.purchase_correction_seconds,
        }

    def corrections(self) -> CorrectableRows | None:
        """What late takes can correct under these rules, empty; None where nothing is corrected."""
        if not self.correction_megabytes:
            return None
        return CorrectableRows(
            self.take_seconds,
            most_bytes=1e6 * self.correction_megabytes,
            most_rows=self.correction_rows,
            upgrades=self.upgrades,
        )


_SETTINGS = tuple(field.name for field in fields(JoinRules) if field.name not in ("partitions", "dropped_by_idle"))
