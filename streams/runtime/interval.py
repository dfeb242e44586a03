"""Timer for periodic work, robust against a clock that is set back."""

from __future__ import annotations

from collections.abc import Callable


class IntervalTimer:
    """Whether `seconds` have passed since `begin`; true before the first `begin`, and when the clock was set back."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._since = float("-inf")

    @property
    def passed(self) -> bool:
        """Whether the interval is over."""
        return not 0 <= self._clock() - self._since < self._seconds

    def begin(self) -> None:
        """Start the interval now."""
        self._since = self._clock()

    def cut_short(self) -> None:
        """End the interval now."""
        self._since = float("-inf")
