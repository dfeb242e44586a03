"""The rows of the label join, and their form in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from schemas.behaviours import BehaviourKind
from trainer.state import State, ragged, unragged, whole_numbers

RELIABILITY = {kind: rank for rank, kind in enumerate(BehaviourKind)}
"""Rank of each kind of behaviour: an exposure is 0, a purchase the most reliable take."""
_KINDS = list(BehaviourKind)


@dataclass(slots=True)
class Moment:
    """The features of an impression, once they are computed; a correction shares those of the impression it repeats."""

    features: bytes = b""
    """float32 numbers in the order of their names; empty until the impression is learned from."""


@dataclass(slots=True)
class Impression:
    """One exposure with the user's history as of its second and, once resolved, its label."""

    event_id: str
    partition: int
    offset: int
    second: int
    user_id: str
    item: int
    """Number of the item in the catalogue."""
    history: tuple[int, ...]
    """Numbers of the items taken by the user before this second, each once, the longest ago first; a trigger item comes
    last."""
    history_seconds: tuple[int, ...]
    """Seconds of their newest takes."""
    retaken: bool
    """Whether the user had taken this item before."""
    defines_publish: bool
    label: int = 0
    taken_as: BehaviourKind | None = None
    """The most reliable kind of take of it so far."""
    value: float = 0.0
    """What that take was worth, price times pieces; 0 where it does not say."""
    query_text: str | None = None
    query_image: bytes | None = None
    """The search that led here, if any, as far as the reader of the rows wants it."""
    query: int = 0
    """Number of that search in the catalogue; 0 without one, and where searches are not numbered."""
    correction: bool = False
    """Whether this repeats an impression that was resolved before, because of a late take: as taken, or as taken in a
    more reliable way. Its id and offset are then those of the late take. It is no impression of its own: what counts
    impressions passes it over."""
    taken_before: BehaviourKind | None = None
    """For a correction: as what the impression was resolved before, where it was taken already."""
    exposure_id: str = ""
    """For a correction: the id of the exposure that it repeats."""
    draw: int = 0
    """Running number of an exposure that was drawn beside a take, from 1; 0 for one that the log holds."""
    drawn_from: int = 0
    """Hash of the event of the take that this exposure was drawn from; 0 for one that was shown."""
    drawn_second: int = 0
    """Second of that take."""
    moment: Moment = field(default_factory=Moment, compare=False)

    @property
    def shown_as(self) -> str:
        """Id of the exposure."""
        return self.exposure_id or self.event_id

    @property
    def upgrade(self) -> bool:
        """Whether only `taken_as` is new of a correction: its impression was resolved as taken already."""
        return self.taken_before is not None

    @property
    def level(self) -> int:
        """Rank of the take in `RELIABILITY`: a purchase counts as a cart and as a click too. 0 if it was not taken."""
        return RELIABILITY[self.taken_as or BehaviourKind.CLICK] if self.label else 0

    @property
    def level_before(self) -> int:
        """For a correction: the `level` that its impression was resolved with before."""
        return RELIABILITY[self.taken_before] if self.taken_before is not None else 0

    @property
    def own_event(self) -> bool:
        """Whether the row stands for an event of the log: no correction of another row, and not drawn."""
        return not self.correction and not self.draw


NO_IMPRESSION = Impression("", 0, 0, 0, "", 0, (), (), retaken=False, defines_publish=False)
"""What a free row of a table holds."""


def learned_as(row: Impression, *, kinds: bool) -> str:
    """What the hash of a row says of its take; with `kinds`, where a model learns them or what they are worth."""
    return f"{row.level_before}-{row.level}-{row.value!r}" if kinds else str(row.label)


def row_bytes(row: Impression) -> int:
    """About how much memory an impression takes while it is found by two keys: the same after a restart."""
    return plain_row_bytes(len(row.history)) + len(row.query_image or b"")


def plain_row_bytes(history: int) -> int:
    """The memory of an impression without a picture, with so many takes before it."""
    return 600 + 16 * history


@dataclass(frozen=True, slots=True)
class Take:
    """A take, as negatives are sampled from it."""

    second: int
    user_id: str
    item: int
    event: int = 0
    """Hash of its event."""
    announces: bool = False
    """Whether the item's time of publication was inferred from it."""
    query: int = 0
    """Number of the search that led to it; 0 without one."""
    trigger: int = 0
    """Number of the item that was looked at just before, where searches are numbered; 0 without one."""

    @property
    def numbers(self) -> Iterator[int]:
        """Numbers of what it names in the catalogue."""
        return filter(None, (self.item, self.query, self.trigger))


def pack_impressions(impressions: Iterable[Impression], *, features: list[bytes] | None = None) -> State:
    """Impressions as arrays. Labels and features, by default those of the rows, may change later on and are copied at
    once; the rest is left for later.
    """
    rows = list(impressions)
    state = State()
    state.arrays["label"] = whole_numbers(row.label for row in rows)
    state.arrays["taken_as"] = whole_numbers(-1 if row.taken_as is None else RELIABILITY[row.taken_as] for row in rows)
    state.arrays["value"] = np.array([row.value for row in rows], np.float64)
    kept = [row.moment.features for row in rows] if features is None else features
    state.later(lambda: _pack_exposures(rows, kept))
    return state


def _pack_exposures(rows: list[Impression], features: list[bytes]) -> State:
    """All but the labels. Features may come later on, so those of now are given."""
    state = State()
    for name in ("partition", "offset", "second", "item", "query", "draw", "drawn_from", "drawn_second"):
        state.arrays[name] = whole_numbers(getattr(row, name) for row in rows)
    state.put_bytes("features", features)
    state.arrays["level_before"] = whole_numbers(row.level_before for row in rows)
    for name in ("retaken", "defines_publish", "correction"):
        state.arrays[name] = np.array([getattr(row, name) for row in rows], bool)
    state.arrays.update(ragged("history", (row.history for row in rows)).arrays)
    state.arrays.update(ragged("history_seconds", (row.history_seconds for row in rows)).arrays)
    state.put_texts("event_id", (row.event_id for row in rows))
    state.put_texts("user_id", (row.user_id for row in rows))
    state.put_texts("exposure_id", (row.exposure_id for row in rows))
    state.put_optional_texts("query_text", (row.query_text for row in rows))
    state.arrays["has_image"] = np.array([row.query_image is not None for row in rows], bool)
    state.put_bytes("query_image", (row.query_image or b"" for row in rows))
    return state


def unpack_impressions(state: State) -> list[Impression]:
    """Inverse of `pack_impressions`; what an earlier build packed lacks the columns that it did not have."""
    arrays = state.arrays
    none = np.zeros(len(arrays["item"]), np.int64)
    # an earlier build did not say as what an impression was taken before, but that it was
    levels, draws = arrays.get("level_before", arrays.get("upgrade", none)), arrays.get("draw", none)
    values = arrays.get("value", none)
    sources, source_seconds = arrays.get("drawn_from", none), arrays.get("drawn_second", none)
    queries = arrays.get("query", none)
    features = state.pieces("features") if "features.ends" in arrays else [b""] * len(none)
    exposures = state.texts("exposure_id") if "exposure_id.ends" in arrays else [""] * len(none)
    histories, seconds = unragged("history", state), unragged("history_seconds", state)
    texts, images = state.optional_texts("query_text"), state.pieces("query_image")
    events, users = state.texts("event_id"), state.texts("user_id")
    return [
        Impression(
            event_id=events[i],
            partition=int(arrays["partition"][i]),
            offset=int(arrays["offset"][i]),
            second=int(arrays["second"][i]),
            user_id=users[i],
            item=int(arrays["item"][i]),
            history=tuple(histories[i]),
            history_seconds=tuple(seconds[i]),
            retaken=bool(arrays["retaken"][i]),
            defines_publish=bool(arrays["defines_publish"][i]),
            label=int(arrays["label"][i]),
            taken_as=None if arrays["taken_as"][i] < 0 else _KINDS[arrays["taken_as"][i]],
            query_text=texts[i],
            query_image=images[i] if arrays["has_image"][i] else None,
            correction=bool(arrays["correction"][i]),
            taken_before=_KINDS[int(levels[i])] if levels[i] else None,
            value=float(values[i]),
            exposure_id=exposures[i],
            query=int(queries[i]),
            draw=int(draws[i]),
            drawn_from=int(sources[i]),
            drawn_second=int(source_seconds[i]),
            moment=Moment(features[i]),
        )
        for i in range(len(events))
    ]
