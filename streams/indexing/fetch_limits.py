"""How much of fetching is under way: requests of each host, requests of all hosts, bytes in memory.

Whoever may not go on waits in a queue, in order. Waiting is no failure: the caller's stream is held back by it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from schemas.errors import ContentUnavailable, Unprocessable

T = TypeVar("T")

MAX_HOSTS = 10_000
"""Hosts whose limits are remembered; the one that was asked longest ago is forgotten first."""
FIRST_LIMIT, LOWEST_LIMIT, STEP = 32, 4, 8
OVERLOADED_SHARE = 0.25
QUIET_AFTER = 8


class FetchFailed(ContentUnavailable):
    """A picture that could not be had now."""

    def __init__(self, url: str, detail: str, *, overload: bool = False, again: bool = False) -> None:
        super().__init__(url, detail)
        self.overload = overload
        """Whether it is a sign that the host has too much to do: no answer in time, no connection, status 429 or 503.
        """
        self.again = again
        """Whether the next moment may be better, so that a second request is worth it."""


class HostLimit:
    """Requests under way at one host: a limit that follows its answers, and a queue of those above it.

    The limit is judged after each round of as many answers. It is halved if more than `OVERLOADED_SHARE` of a round
    were signs of overload; else, if requests waited, it grows by `STEP`: additive increase, multiplicative decrease
    (Chiu and Jain, 1989), on shares of a round instead of single losses, because a few per cent of failures say nothing
    about load. After `QUIET_AFTER` signs of overload without another answer between them the host is left alone for
    `quiet_seconds`; the first answer ends that.
    """

    def __init__(self, most: int, *, quiet_seconds: float, clock: Callable[[], float]) -> None:
        self.limit = min(FIRST_LIMIT, most)
        self._most, self._lowest = most, min(LOWEST_LIMIT, most)
        self._quiet_seconds = quiet_seconds
        self._clock = clock
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._answers = self._overloads = self._overloads_in_a_row = 0
        self._quiet_until = float("-inf")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._running and not self._waiting

    @property
    def is_quiet(self) -> bool:
        """Whether the host is left alone at the moment."""
        return self._quiet_until > self._clock()

    @property
    def answers_others(self) -> bool:
        """Whether the host is known to answer, so that a failure is one of the picture."""
        return self._overloads_in_a_row < QUIET_AFTER // 2

    async def enter(self) -> None:
        """Wait for a turn."""
        if self._running < self.limit and not self._waiting:
            self._running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn came in the same step
                self.leave()
            raise

    def leave(self) -> None:
        """Give the turn to the next."""
        self._running -= 1
        while self._waiting and self._running < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)

    def learn(self, *, overload: bool) -> None:
        """Take note of an answer, or of none."""
        self._answers += 1
        self._overloads += overload
        self._overloads_in_a_row = self._overloads_in_a_row + 1 if overload else 0
        if self._overloads_in_a_row >= QUIET_AFTER:
            self._quiet_until = self._clock() + self._quiet_seconds
        elif not overload:
            self._quiet_until = float("-inf")
        if self._answers < self.limit:
            return
        if self._overloads > OVERLOADED_SHARE * self._answers:
            self.limit = max(self._lowest, self.limit // 2)
        elif self._waiting:
            self.limit = min(self._most, self.limit + STEP)
        self._answers = self._overloads = 0


class Lane:
    """Requests of one kind: at most `most` under way at a time, of each host as many as its limit allows.

    A request that failed by a chance of the moment is repeated at once while its host answers others, up to `tries`.
    """

    def __init__(
        self, *, most: int, most_per_host: int, quiet_seconds: float, tries: int, clock: Callable[[], float]
    ) -> None:
        self._tries = tries
        self._turns = asyncio.Semaphore(most)
        self._most_per_host = most_per_host
        self._quiet_seconds = quiet_seconds
        self._clock = clock
        self._hosts: OrderedDict[str, HostLimit] = OrderedDict()

    def host(self, name: str) -> HostLimit:
        """The limit of a host."""
        found = self._hosts.get(name)
        if found is None:
            if len(self._hosts) >= MAX_HOSTS:
                idle = next((other for other, limit in self._hosts.items() if limit.is_idle), None)
                if idle is not None:
                    del self._hosts[idle]
            found = HostLimit(self._most_per_host, quiet_seconds=self._quiet_seconds, clock=self._clock)
            self._hosts[name] = found
        self._hosts.move_to_end(name)
        return found

    async def ask(self, url: str, host: str, request: Callable[[], Awaitable[T]]) -> T:
        """Send a request when it is its turn.

        Raises what the last try raises; `FetchFailed` without one where the host is left alone.
        """
        limit = self.host(host)
        left = self._tries
        while True:
            left -= 1
            try:
                return await self._once(url, limit, request)
            except FetchFailed as error:
                if not (left and error.again and limit.answers_others):
                    raise

    async def _once(self, url: str, limit: HostLimit, request: Callable[[], Awaitable[T]]) -> T:
        await limit.enter()
        try:
            if limit.is_quiet:
                raise FetchFailed(url, "its host did not answer lately")
            async with self._turns:
                try:
                    answer = await request()
                except FetchFailed as error:
                    limit.learn(overload=error.overload)
                    raise
                except Unprocessable:
                    limit.learn(overload=False)
                    raise
                limit.learn(overload=False)
                return answer
        finally:
            limit.leave()


class ByteRoom:
    """Bytes that may be held at a time. One who asks for more than is free waits, and so do all behind."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes (at most all there are) while the block runs."""
        size = min(size, self._size)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._free += size
            self._serve()

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)
