"""The protocol of a behaviour store (users' recent takes for serving, with the position in the click log that they
reflect), and the store in memory.

It is a *view*: everything in it can be replayed from `behaviours`. What a batch changes and the position after it are
written in one transaction, so data and position always agree, even after a crash.

A user who asked to be forgotten is marked in the transaction that deletes their data. Every batch is checked against
these marks, so records that the click log held of the user at that time are passed over in every recorder and every
replay. Marks outlive a rebuild, and go when the click log holds no such record any more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from typing_extensions import override

from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.histories.erasure_marks import ErasureMark
from streams.stores.histories.packed_history import (
    RecordReport,
    TakenItem,
    UserTakes,
    apply_batch,
    fresh_part,
    skipped,
    without_erased,
)

COUNTS = ("exposures", "takes", "duplicates", "broken", "erased")


class BehaviourStore(Protocol):
    """Per-user sequences of taken items in event time, with the log position that they reflect."""

    async def bind(self, log: TopicIncarnation) -> None:
        """Bind the positions to `log`; call before the first `record`.

        Raises `Misconfigured` if the store was filled from another log.
        """

    async def record(
        self, partition: int, events: Sequence[BehaviourRecord], *, first_offset: int, next_offset: int
    ) -> RecordReport:
        """Record one partition's events in [first_offset, next_offset), all or nothing, position included.

        Offsets in that range that carry no record (transaction markers, deleted by retention) are passed over.
        Records below the stored position are ignored, so any replay, however it is cut, changes nothing. If the store
        is behind `first_offset` (it lost data, or was cleared), it writes nothing and reports where to read again.
        """

    async def history(self, user_id: str) -> list[TakenItem]:
        """Return the items that a user took last, oldest first; empty for an unknown user."""

    async def taken_items(self, user_id: str) -> list[str]:
        """Return the items of `history` alone, at a tenth of the cost."""

    async def takes(self, user_id: str) -> tuple[list[str], list[int]]:
        """Return the items of `history` and the seconds of their takes, which is all that scoring needs."""

    async def forget(self, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> int:
        """Delete these users' data, and never record again what the log held of them; returns how many were new.

        They were read from `source`, a partition of one incarnation of the topic `forgotten`, whose position is kept
        with it. Requests below that position are ignored, since a forgotten user may have come back as a new one.
        """

    async def forgotten_positions(self) -> dict[str, int]:
        """Next offset of each source of `forget`; requests below it are done."""

    async def drop_spent_marks(self, beginnings: Mapping[int, int], *, sources: Collection[str]) -> int:
        """Drop marks that no record can need any more; how many.

        In every partition of the bound log the oldest offset that it holds (`beginnings`) and the store's own position
        have reached the mark's end. Marks of other logs go, too, together
        with the positions of sources that are not among `sources`, so that their requests are read again if such a log
        is ever bound again.
        """

    async def positions(self) -> dict[int, int]:
        """Next offset of each partition seen so far."""

    async def counts(self) -> dict[str, int]:
        """Sum up `stored` (`exposures` + `takes`), `duplicates`, `broken` and `erased` since the view began."""

    async def clear(self) -> None:
        """Remove everything, the log's identity included. At once for readers; a running recorder starts over."""

    async def ping(self) -> None:
        """Raise `StoreUnavailable` if the store does not answer."""

    async def close(self) -> None:
        """Close connections."""


def foreign_log(found: TopicIncarnation, wanted: TopicIncarnation) -> Misconfigured:
    """The error for positions that belong to another log."""
    what = "cluster" if found.cluster_id != wanted.cluster_id else "topic"
    return Misconfigured(
        f"the behaviour store was filled from topic {found.topic} (id {found.topic_id}) of cluster {found.cluster_id}, "
        f"but {wanted.topic} now has id {wanted.topic_id} in cluster {wanted.cluster_id}: another {what}, so stored "
        "positions mean nothing. Check MIM_KAFKA__BOOTSTRAP_SERVERS, MIM_TOPICS__PREFIX and MIM_REDIS__KEY_PREFIX; "
        "if the log was replaced on purpose, run 'mimstream record --rebuild'"
    )


class InMemoryBehaviourStore(BehaviourStore):
    """The protocol in a process's own memory."""

    def __init__(self, config: BehaviourStoreConfig | None = None) -> None:
        self._config = config or BehaviourStoreConfig()
        self.users: dict[str, UserTakes] = {}
        """Data of each user."""
        self._positions: dict[int, int] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._log: TopicIncarnation | None = None
        self._marks: dict[str, ErasureMark] = {}
        self._forgotten_positions: dict[str, int] = {}

    @override
    async def bind(self, log: TopicIncarnation) -> None:
        if self._log not in (None, log):
            raise foreign_log(self._log, log)
        self._log = log

    @override
    async def record(
        self, partition: int, events: Sequence[BehaviourRecord], *, first_offset: int, next_offset: int
    ) -> RecordReport:
        stored = self._positions.get(partition, 0)
        if self._log is None or stored < first_offset:
            return RecordReport(partition, stored, resume_from=stored)
        unread = fresh_part(events, stored=stored)
        ends = {user: mark.ends_in(self._log.cluster_id, self._log.topic_id) for user, mark in self._marks.items()}
        fresh = without_erased(unread, ends, partition=partition)
        for event in fresh:
            if event.behaviour is not None:
                self.users.setdefault(event.behaviour.user_id, UserTakes())
        report, _, _ = apply_batch(
            self.users,
            fresh,
            partition=partition,
            next_offset=max(stored, next_offset),
            length=self._config.history_length,
            remembered=self._config.remembered_event_ids,
        )
        report = skipped(report, replayed=len(events) - len(unread), erased=len(unread) - len(fresh))
        self._positions[partition] = report.next_offset
        for name in COUNTS:
            self._counts[name] += getattr(report, name)
        return report

    @override
    async def forget(self, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> int:
        if self._forgotten_positions.get(source, 0) >= next_offset:
            return 0
        for user in users:
            self._marks[user.user_id] = ErasureMark.of(user)
            self.users.pop(user.user_id, None)
        self._forgotten_positions[source] = next_offset
        return len(users)

    @override
    async def forgotten_positions(self) -> dict[str, int]:
        return dict(self._forgotten_positions)

    @override
    async def drop_spent_marks(self, beginnings: Mapping[int, int], *, sources: Collection[str]) -> int:
        if self._log is None:
            return 0
        spent = [user for user, mark in self._marks.items() if mark.is_spent(self._log, beginnings, self._positions)]
        for user in spent:
            del self._marks[user]
        self._forgotten_positions = {one: at for one, at in self._forgotten_positions.items() if one in sources}
        return len(spent)

    @override
    async def history(self, user_id: str) -> list[TakenItem]:
        user = self.users.get(user_id)
        return user.history() if user else []

    @override
    async def taken_items(self, user_id: str) -> list[str]:
        user = self.users.get(user_id)
        return list(user.items) if user else []

    @override
    async def takes(self, user_id: str) -> tuple[list[str], list[int]]:
        user = self.users.get(user_id)
        return (list(user.items), [math.floor(at) for at in user.times]) if user else ([], [])

    @override
    async def positions(self) -> dict[int, int]:
        return dict(self._positions)

    @override
    async def counts(self) -> dict[str, int]:
        return with_total(self._counts)

    @override
    async def clear(self) -> None:
        marks, positions = self._marks, self._forgotten_positions
        self.__init__(self._config)  # type: ignore[misc]
        self._marks, self._forgotten_positions = marks, positions

    @override
    async def ping(self) -> None:
        pass

    @override
    async def close(self) -> None:
        pass


def with_total(counts: dict[str, int]) -> dict[str, int]:
    """Counts in the form that `BehaviourStore.counts` returns."""
    return {"stored": counts["exposures"] + counts["takes"], **counts}
