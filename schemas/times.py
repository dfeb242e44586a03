"""Times as numbers: their unit by their size, and what a number that is no time looks like."""

from __future__ import annotations

import math
from datetime import UTC, datetime

EARLIEST_EVENT = datetime.fromtimestamp(100_000_000, UTC)
"""Events before 3 March 1973 are refused: smaller numbers are years, days and dates that were taken for seconds."""

_LAST_SECOND = 2e10
"""In the year 2603; a larger number of seconds is one of milliseconds, and so on."""
_UNITS = (1, 1_000, 1_000_000, 1_000_000_000)


def units_per_second(number: float) -> int | None:
    """What a time since 1970 counts: 1 for seconds, 1,000 for ms, then us and ns; None if it is too large for any."""
    return next((unit for unit in _UNITS if abs(number) <= _LAST_SECOND * unit), None)


def too_early(seconds: float) -> str:
    """A time before `EARLIEST_EVENT` in words, with what its number looks like."""
    number = math.floor(seconds)
    return f"{number} seconds since 1970, which looks like {_looks_like(number)}; events lie after {EARLIEST_EVENT:%F}"


def _looks_like(number: int) -> str:
    if number == 0:
        return "no time"
    if 1_900 <= number <= 2_200:
        return "a year"
    if 3_650 <= number <= 80_000:
        return "days since 1970"
    year, month = (number // 10_000, number // 100 % 100) if number > 999_999 else (number // 100, number % 100)
    if 1_900 <= year <= 2_200 and 1 <= month <= 12:
        return "a date"
    return "a time since something else than 1970"
