"""A snapshot whose checksums fit and whose contents do not: it is restored or refused, in bounded time and memory."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import Misconfigured
from streams.stores.artifacts.arrays import pack_arrays, unpack_arrays
from streams.stores.artifacts.checkpoints import META_FILE, STATE_FILE, VALUES_FILE
from tests.fuzz import snapshots
from trainer.state import State, ragged, unragged

STATE = snapshots.whole()[STATE_FILE]
ARRAYS = unpack_arrays(STATE)
VALUES = json.loads(snapshots.whole()[VALUES_FILE])
SPARE = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ABSURD: list[Any] = [
    *(0, 1, -1, 255, 1 << 31, 1 << 40, 1 << 62, -(1 << 62), 10**40, 1e308),
    *(True, None, "9" * 50, [], {}, [1, 2]),
]
load_state, load_values, load_meta = (snapshots.with_file(name) for name in (STATE_FILE, VALUES_FILE, META_FILE))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inside for found in places(one, (*path, key)))]


def loaded_or_refused(load: Any, data: bytes) -> None:
    with suppress(Misconfigured):
        load(data)


def test_the_kept_snapshot_is_one_that_this_trainer_goes_on_from() -> None:
    """If not: run `python tests/fuzz/snapshots.py`, or all that is changed here is refused for the same reason."""
    load_state(STATE)


@SPARE
@given(
    st.sampled_from(sorted(ARRAYS)),
    st.sampled_from(["<f4", "<f8", "<i8", "<i4", "|u1", "|b1", "<u8"]),
    st.none() | st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([0, 1, -1, 7, 1 << 31, 1 << 40, 1 << 62, -(1 << 62)]),
    st.integers(0, 1 << 16),
)
def test_whatever_stands_in_an_array(name: str, dtype: str, shape: list[int] | None, number: int, at: int) -> None:
    with np.errstate(all="ignore"):
        filler = np.array(number).astype(dtype)
        changed = ARRAYS[name].astype(dtype) if shape is None else np.full(shape, filler, dtype)
        if shape is None and changed.size:
            changed.reshape(-1)[at % changed.size] = filler
    loaded_or_refused(load_state, pack_arrays({**ARRAYS, name: changed}))
    loaded_or_refused(load_state, pack_arrays({other: array for other, array in ARRAYS.items() if other != name}))


def test_no_number_makes_a_trainer_reserve_what_is_not_there() -> None:
    numbers = cycle((1 << 40, 1 << 62, -1))  # each in a third of the arrays
    for name, array in ARRAYS.items():
        if array.dtype == np.int64 and array.size:
            changed = array.copy()
            changed.reshape(-1)[0] = next(numbers)
            loaded_or_refused(load_state, pack_arrays({**ARRAYS, name: changed}))


@SPARE
@given(st.sampled_from(places(VALUES)), st.sampled_from(ABSURD))
def test_whatever_stands_in_a_value(path: tuple[Any, ...], absurd: Any) -> None:
    changed = {"": json.loads(json.dumps(VALUES))}
    holder: Any = changed
    for key in ("", *path)[:-1]:
        holder = holder[key]
    holder[("", *path)[-1]] = absurd
    loaded_or_refused(load_values, json.dumps(changed[""]).encode())


NO_STATES = {
    "empty": b"",
    "noise": b"\xff" * 100,
    "length": struct.pack("<Q", 1 << 63) + b"{}",
    "list": struct.pack("<Q", 2) + b"[]",
    "no header": struct.pack("<Q", 20) + b"{}",
    "cut": STATE[:-1],
    "longer": STATE + b"\0",
    "shape": STATE.replace(b'"shape":[2,8]', b'"shape":[9,8]'),
    "bfloat16": STATE.replace(b'"dtype":"I32"', b'"dtype":"BF16"'),
    "objects": STATE.replace(b'"dtype":"I32"', b'"dtype":"OBJ"'),
}


@pytest.mark.parametrize("data", NO_STATES.values(), ids=NO_STATES.keys())
def test_a_state_that_is_none_is_refused(data: bytes) -> None:
    assert data != STATE
    with pytest.raises(Misconfigured, match="is damaged"):
        load_state(data)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b'{"a": ' + b"[" * 100_000, b"9" * 5_000, b"\xff"], ids=lambda data: data[:6]
)
def test_values_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(Misconfigured, match="is damaged"):
        load_values(data)


@pytest.mark.parametrize(
    "absurd", [{"dim": 10**12}, {"dim": 0}, {"rows_trained": -1}, {"format": 10**30}, {"offsets": {"behaviours": 1}}]
)
def test_a_description_that_is_absurd_is_refused_before_anything_is_made_of_it(absurd: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured, match="snapshot"):
        load_meta(json.dumps(json.loads(snapshots.whole()[META_FILE]) | absurd).encode())


def test_places_that_name_the_same_numbers_again_and_again_are_refused() -> None:
    state = ragged("lists", [[1, 2, 3]] * 1_000)
    assert unragged("lists", state) == [[1, 2, 3]] * 1_000
    state.arrays["lists.ends"][::2] = 0  # each second list would hold everything before it
    with pytest.raises(ValueError, match="does not fit"):
        unragged("lists", State(state.arrays))
