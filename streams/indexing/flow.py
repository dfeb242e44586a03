"""The control flow of Faust's agents: which events still count, when to stop, and acknowledging in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from schemas.errors import Fenced

E = TypeVar("E")


class Flow:
    """The state that the agents of one process share.

    No exception may leave an agent's body: what it had in hand would neither be acknowledged nor delivered again. So a
    failure is put here, the agent stops reading, and the process ends with it.
    """

    def __init__(self, *, check_role: Callable[[], Awaitable[None]]) -> None:
        self._check_role = check_role
        self._check_session: Callable[[], Awaitable[None]] = check_role
        self._epoch = 0
        self._in_hand = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def partitions_moved(self) -> None:
        """Start a new epoch: partitions are being reassigned, and what is in hand will be read again by their owner."""
        self._epoch += 1

    def watch_session(self, check: Callable[[], Awaitable[None]]) -> None:
        """Call `check` too before each write, in place of an earlier one. It raises `Unavailable` or `Fenced`."""
        self._check_session = check

    @property
    def epoch(self) -> int:
        """How often partitions were reassigned. Records that were read in another epoch do not count any more."""
        return self._epoch

    def guard(self, epoch: int | None = None) -> Callable[[], Awaitable[None]]:
        """The check before each write of what was read in `epoch` (by default, in the present one).

        It raises `Fenced` once this worker may no longer write.
        """
        epoch = self._epoch if epoch is None else epoch

        async def check() -> None:
            if epoch != self._epoch:
                raise Fenced("the partitions were handed out anew; what was in hand is read again")
            await self._check_role()
            await self._check_session()

        return check

    @asynccontextmanager
    async def hand(self, epoch: int | None = None) -> AsyncIterator[None]:
        """Work that a clean stop waits for. Once stopping has begun, new work waits here until it is cancelled.

        `epoch` is that of reading it (by default, the present one): being fenced because partitions moved since is no
        failure.
        """
        if self._draining or self.failed.done():
            await asyncio.Event().wait()
        epoch = self._epoch if epoch is None else epoch
        self._in_hand += 1
        self._idle.clear()
        try:
            yield
        except Fenced as error:
            if epoch == self._epoch:
                self.fail(error)
        except Exception as error:
            self.fail(error)
        finally:
            self._in_hand -= 1
            if not self._in_hand:
                self._idle.set()

    async def drain(self, within_seconds: float) -> bool:
        """Begin nothing new and wait for what is in hand. False if it is not done within the time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), within_seconds)
        except TimeoutError:
            return False
        return True

    def fail(self, error: Exception) -> None:
        """Stop the process for this reason; the first one counts."""
        if not self.failed.done():
            self.failed.set_exception(error)


@dataclass
class _Pending(Generic[E]):
    event: E
    done: bool = False


@dataclass
class OrderedAcks(Generic[E]):
    """Acknowledges in the order of arrival, whatever the order of completion.

    Faust commits beyond a gap at the head of a partition: with 10 still in hand and 11 acknowledged it commits 12. So
    nothing is acknowledged before everything that came before it in its partition.
    """

    ack: Callable[[E], Awaitable[Any]]
    _waiting: dict[Hashable, deque[_Pending[E]]] = field(default_factory=dict)

    def arrived(self, partition: Hashable, event: E) -> Callable[[], Awaitable[None]]:
        """Register an event; call what this returns when it is done."""
        line = self._waiting.setdefault(partition, deque())
        mine = _Pending(event)
        line.append(mine)

        async def done() -> None:
            mine.done = True
            while line and line[0].done:
                await self.ack(line.popleft().event)

        return done
