"""Spans of a folder for training encoders, training click models, tuning and testing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from trainer.datasets.folder import DAY_SECONDS
from trainer.datasets.spans import BehaviourLog, Span

ProtocolName = Literal["time-split", "prequential", "cold"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
REFRESH_SHARES = (0.5, 0.6, 0.7, 0.8)
"""Shares of the events after which a prequential encoder is retrained (each midnight where only days are known)."""


@dataclass(frozen=True, eq=False)
class Protocol:
    """Spans of event time in order, without overlap, and the end of each encoder version's training data.

    `time-split`: one encoder, older than every row. `prequential`: each row uses the newest encoder that is older than
    it, as a live system does. `cold`: as time-split, but no feature or history contains takes of held-out items, as if
    these had just been published, and only cold items are evaluated.
    """

    name: ProtocolName
    log: BehaviourLog
    encode: Span
    train: Span
    validation: Span
    test: Span
    encoder_stops: tuple[int, ...]
    """Per encoder version: the second before which all its training data lies."""

    def encoder_of(self, second_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Version used at each second: the newest without training data of that second or later."""
        return np.maximum(np.searchsorted(np.array(self.encoder_stops), second_N, side="right") - 1, 0)


def protocol_of(log: BehaviourLog, name: ProtocolName) -> Protocol:
    """Cut a folder's event time. Raises `Misconfigured` if it is too short to be cut."""
    if name == "cold" and not log.held_out.any():
        log = replace(log, held_out=held_out_by_hash(log.data.item_ids))
    encode, validation, test = log.learn, log.validation, log.test
    train = Span(encode.stop, validation.start)
    bounds = [encode.start, encode.stop, validation.start, test.start, test.stop]
    if len(set(bounds)) != len(bounds):
        raise Misconfigured(
            f"data set {log.data.name} is too short to be cut into encoder, training, validation and test spans: "
            f"they would begin at {bounds}; it needs takes on at least four days, or at four different seconds"
        )
    stops: list[int] = [encode.stop]
    if name == "prequential":
        if log.data.day_resolution:
            stops = list(range(encode.stop, test.stop - DAY_SECONDS + 1, DAY_SECONDS))
        else:
            stops = sorted({log.boundary(share) for share in REFRESH_SHARES})
    return Protocol(name, log, encode, train, validation, test, tuple(stops))


def held_out_by_hash(item_ids: list[str]) -> NDArray[np.bool_]:
    """A fixed tenth of the items, by item number (row 0 is padding)."""
    tenth = [int(hashlib.md5(item.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0 for item in item_ids]
    return np.array([False, *tenth])
