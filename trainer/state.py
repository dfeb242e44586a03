"""What a part of the trainer is restored from: arrays and plain values by name. No code in it, so nothing to unpickle.

Every part returns from `snapshot()` a `State` that shares no memory with it, and returns to it with
`restore(state)`. Parts nest by name; texts are stored as one run of bytes with the place where each ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class State:
    """Arrays (any shape, numbers and booleans only) and values that JSON can carry."""

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, part: State) -> None:
        """Keep another part's state under a name."""
        for key, array in part.arrays.items():
            self.arrays[f"{name}/{key}"] = array
        self.values[name] = part.values

    def add(self, part: State) -> None:
        """Keep another part's state beside what is here, under the names that it has there."""
        self.arrays.update(part.arrays)
        self.values.update(part.values)

    def part(self, name: str) -> State:
        """The state that was put under a name. Raises `KeyError` if there is none."""
        prefix = f"{name}/"
        inside = {key.removeprefix(prefix): array for key, array in self.arrays.items() if key.startswith(prefix)}
        return State(inside, self.values[name])

    def put_texts(self, name: str, texts: Iterable[str]) -> None:
        """Keep a list of texts."""
        self.put_bytes(name, (text.encode() for text in texts))

    def texts(self, name: str) -> list[str]:
        """A list of texts, as it was put."""
        return [piece.decode() for piece in self.pieces(name)]

    def put_bytes(self, name: str, pieces: Iterable[bytes]) -> None:
        """Keep a list of byte strings."""
        kept = list(pieces)
        self.arrays[f"{name}.bytes"] = np.frombuffer(b"".join(kept), np.uint8)
        self.arrays[f"{name}.ends"] = np.cumsum([len(piece) for piece in kept], dtype=np.int64)

    def pieces(self, name: str) -> list[bytes]:
        """A list of byte strings, as it was put. Raises `ValueError` if the places do not fit the bytes."""
        joined, ends = self.arrays[f"{name}.bytes"].tobytes(), self.arrays[f"{name}.ends"].tolist()
        return [joined[start:end] for start, end in _spans(name, ends, len(joined))]

    def put_optional_texts(self, name: str, texts: Iterable[str | None]) -> None:
        """Keep a list of texts of which some are missing."""
        kept = list(texts)
        self.arrays[f"{name}.given"] = np.array([text is not None for text in kept], bool)
        self.put_texts(name, (text or "" for text in kept))

    def optional_texts(self, name: str) -> list[str | None]:
        """A list of texts of which some are missing, as it was put."""
        given = self.arrays[f"{name}.given"].tolist()
        return [text if there else None for text, there in zip(self.texts(name), given, strict=True)]


def whole_numbers(values: Iterable[int]) -> NDArray[np.int64]:
    """Integers as an array, also where there are none."""
    return np.fromiter(values, np.int64)


def ragged(name: str, lists: Iterable[Sequence[int]]) -> State:
    """Lists of integers of different lengths as one array and the place where each ends."""
    kept = list(lists)
    ends = np.cumsum([len(one) for one in kept], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(kept), np.int64, int(ends[-1]) if kept else 0)
    return State({f"{name}.flat": flat, f"{name}.ends": ends})


def unragged(name: str, state: State) -> list[list[int]]:
    """What `ragged` was given. Raises `ValueError` if the places do not fit the numbers."""
    flat, ends = state.arrays[f"{name}.flat"].tolist(), state.arrays[f"{name}.ends"].tolist()
    return [flat[start:end] for start, end in _spans(name, ends, len(flat))]


def _spans(name: str, ends: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Where each piece begins and ends. One after the other and to the very end: none is held twice."""
    starts = [0, *ends[:-1]]
    spans = list(zip(starts, ends, strict=False))
    if (ends[-1] if ends else 0) != length or any(start > end for start, end in spans):
        raise ValueError(f"{name!r} does not fit its places")
    return spans
