"""Where a partition ends while a producer's transaction is open.

```text
offsets   0 ........ last stable offset ........ high watermark
          readable   written, not committed yet
```

What lies between is part of the log as soon as its transaction commits. A partition that counted as read to its end at
the last stable offset would be passed by the watermark meanwhile, and its events would be late.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

log = structlog.get_logger()


class OpenTransactions:
    """The ends of partitions: the high watermark, unless the last stable offset stood still for `patience_seconds`.

    A transaction that hangs holds the watermark up for that long, and not for ever.
    """

    def __init__(self, *, patience_seconds: float, clock: Callable[[], float]) -> None:
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._since: dict[int, tuple[int, float]] = {}
        self._given_up: dict[int, int] = {}
        self.passed_over = 0
        """Transactions that were not waited for any longer."""

    def end(self, partition: int, *, stable: int | None, high: int | None) -> int | None:
        """First offset after what counts as the partition's records; None if the broker has not told."""
        if high is None or stable is None or stable < 0 or stable >= high:
            self._since.pop(partition, None)
            return high
        now = self._clock()
        standing, since = self._since.get(partition, (-1, now))
        if standing != stable:
            since = now
        self._since[partition] = (stable, since)
        if now - since < self._patience_seconds:
            return high
        if self._given_up.get(partition) != stable:
            self._given_up[partition] = stable
            self.passed_over += 1
            log.warning(
                "train.transaction_hangs",
                partition=partition,
                offset=stable,
                records=high - stable,
                seconds=round(now - since),
                do="end the producer's transaction (kafka-transactions.sh abort); what it commits may come too late",
            )
        return stable

    @property
    def open(self) -> int:
        """Partitions with a transaction that is not committed."""
        return len(self._since)
