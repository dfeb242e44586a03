"""When the broker last acknowledged that this worker is alive."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from schemas.errors import BrokerUnavailable


class Heartbeats:
    """Watches a group member's heartbeats: without one for a while, another member may have taken its place."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None

    def watch(self, coordinator: Any) -> None:
        """Note each heartbeat of an aiokafka group coordinator that the broker confirms; joining counts as one.

        The client has no callback for them, so its function that sends them is wrapped.
        """
        self._last = self._clock()
        if getattr(coordinator._do_heartbeat, "is_watched", False):
            return
        send: Callable[[], Awaitable[bool]] = coordinator._do_heartbeat

        async def send_and_record() -> bool:
            sent_at = self._clock()  # the session counts from when the broker received it, not from its answer
            confirmed = await send()
            if confirmed:
                self._last = sent_at
            return confirmed

        send_and_record.is_watched = True  # type: ignore[attr-defined]
        coordinator._do_heartbeat = send_and_record

    async def assert_within(self, seconds: float) -> None:
        """Check before a write. Raises `BrokerUnavailable` if the last heartbeat is older: the session may be over."""
        if self._last is None:
            return
        silent = self._clock() - self._last
        if silent > seconds:
            raise BrokerUnavailable(
                "Kafka", f"no heartbeat was confirmed for {silent:.1f} s, nothing is written meanwhile"
            )
