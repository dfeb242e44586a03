"""What is done every so many seconds, by a clock that somebody may set back."""

from __future__ import annotations

from collections.abc import Callable


class IntervalTimer:
    """Says whether `seconds` have passed since it `began`; they have before that, and where the clock was set back."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._since = float("-inf")

    @property
    def passed(self) -> bool:
        """Whether it is time."""
        return not 0 <= self._clock() - self._since < self._seconds

    def begin(self) -> None:
        """Count from now on."""
        self._since = self._clock()

    def cut_short(self) -> None:
        """It is time now."""
        self._since = float("-inf")
