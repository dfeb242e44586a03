"""What every behaviour store promises: users' recent takes for serving, and the place in the click log up to which they
are true; and the store in memory.

A *view*: everything in it can be replayed from `behaviours`. What a batch changes and the position after it are
written in one transaction, so data and position can never disagree, whoever is killed when.

Who asked to be forgotten is marked here in the transaction that deletes what is kept of him. Every batch is written
against these marks, so it does not matter which recorder knew of it, or how often the log is replayed: what the click
log held of him when he asked is passed over. Marks outlive a rebuild.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import Numbered
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
    """Per-user sequences of takes in event time, with the log position that they reflect."""

    async def bind(self, log: TopicIncarnation) -> None:
        """Tie the positions to `log`; call before the first `record`.

        Raises `Misconfigured` if the store was filled from another log.
        """

    async def record(
        self, partition: int, events: Sequence[Numbered], *, first_offset: int, next_offset: int
    ) -> RecordReport:
        """Take in one partition's records in [first_offset, next_offset), all or nothing, position included.

        Offsets in that range that carry no record (transaction markers, deleted by retention) are passed over. What
        lies below the stored position is left alone, so any replay, however it is cut, changes nothing. If the store
        is behind `first_offset` (it lost data, or was cleared), it writes nothing and says where to read again.
        """

    async def history(self, user_id: str) -> list[TakenItem]:
        """Return the newest takes of a user, oldest first; empty for an unknown one."""

    async def taken_items(self, user_id: str) -> list[str]:
        """Return the items of `history` alone: what scoring asks for, at a tenth of the cost."""

    async def forget(self, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> int:
        """Delete what is kept of these users, and never take in again what the log held of them; how many were new.

        They were read from `source`, a partition of one incarnation of the topic `forgotten`, whose position is kept
        with it; what lies below that position is left alone, since a user who was forgotten may have come back as a new
        one.
        """

    async def forgotten_positions(self) -> dict[str, int]:
        """Next offset of each source of `forget`; what lies below has been obeyed."""

    async def positions(self) -> dict[int, int]:
        """Next offset of each partition seen so far."""

    async def counts(self) -> dict[str, int]:
        """Sum up `stored` (`exposures` + `takes`), `duplicates`, `broken` and `erased` since the view began."""

    async def clear(self) -> None:
        """Forget everything, the log's identity included. At once for readers; a running recorder starts over."""

    async def ping(self) -> None:
        """Raise `StoreUnavailable` if the store does not answer."""

    async def close(self) -> None:
        """Give connections back."""


def foreign_log(found: TopicIncarnation, wanted: TopicIncarnation) -> Misconfigured:
    """Say that the positions belong to another log, and what to do."""
    what = "cluster" if found.cluster_id != wanted.cluster_id else "topic"
    return Misconfigured(
        f"the behaviour store was filled from topic {found.topic} (id {found.topic_id}) of cluster {found.cluster_id}, "
        f"but {wanted.topic} now has id {wanted.topic_id} in cluster {wanted.cluster_id}: another {what}, so stored "
        "positions mean nothing. Check MIM_KAFKA__BOOTSTRAP_SERVERS, MIM_TOPICS__PREFIX and MIM_REDIS__KEY_PREFIX; "
        "if the log was replaced on purpose, run 'mimstream record --rebuild'"
    )


class InMemoryBehaviourStore:
    """The protocol in a process's own memory."""

    def __init__(self, config: BehaviourStoreConfig | None = None) -> None:
        self._config = config or BehaviourStoreConfig()
        self.users: dict[str, UserTakes] = {}
        """What is kept of each."""
        self._positions: dict[int, int] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._log: TopicIncarnation | None = None
        self._marks: dict[str, ErasureMark] = {}
        self._forgotten_positions: dict[str, int] = {}

    async def bind(self, log: TopicIncarnation) -> None:
        """See `BehaviourStore`."""
        if self._log not in (None, log):
            raise foreign_log(self._log, log)
        self._log = log

    async def record(
        self, partition: int, events: Sequence[Numbered], *, first_offset: int, next_offset: int
    ) -> RecordReport:
        """See `BehaviourStore`."""
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

    async def forget(self, users: Sequence[ForgottenUser], *, source: str, next_offset: int) -> int:
        """See `BehaviourStore`."""
        if self._forgotten_positions.get(source, 0) >= next_offset:
            return 0
        for user in users:
            self._marks[user.user_id] = ErasureMark.of(user)
            self.users.pop(user.user_id, None)
        self._forgotten_positions[source] = next_offset
        return len(users)

    async def forgotten_positions(self) -> dict[str, int]:
        """See `BehaviourStore`."""
        return dict(self._forgotten_positions)

    async def history(self, user_id: str) -> list[TakenItem]:
        """See `BehaviourStore`."""
        user = self.users.get(user_id)
        return user.history() if user else []

    async def taken_items(self, user_id: str) -> list[str]:
        """See `BehaviourStore`."""
        user = self.users.get(user_id)
        return list(user.items) if user else []

    async def positions(self) -> dict[int, int]:
        """See `BehaviourStore`."""
        return dict(self._positions)

    async def counts(self) -> dict[str, int]:
        """See `BehaviourStore`."""
        return with_total(self._counts)

    async def clear(self) -> None:
        """See `BehaviourStore`."""
        marks, positions = self._marks, self._forgotten_positions
        self.__init__(self._config)  # type: ignore[misc]
        self._marks, self._forgotten_positions = marks, positions

    async def ping(self) -> None:
        """See `BehaviourStore`."""

    async def close(self) -> None:
        """See `BehaviourStore`."""


def with_total(counts: dict[str, int]) -> dict[str, int]:
    """Counts as a store tells them."""
    return {"stored": counts["exposures"] + counts["takes"], **counts}
