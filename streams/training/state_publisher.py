"""States of items for those who serve: what changed, in transactions of the leader, every so many takes or seconds.

Servers compute features from these states and nothing else, so a score rests on takes that are at most one interval
older than the trainer's own. A trainer that is behind what the topic holds, as after a restart, writes nothing until it
has caught up; one that does not lead never writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from schemas.errors import Misconfigured, Unavailable
from streams.broker.clients import BrokerConfig
from streams.broker.leadership import Leadership
from streams.broker.topic_follower import TopicFollower
from streams.broker.topics import TopicsConfig
from streams.runtime.interval import IntervalTimer
from streams.training.config import TrainConsumerConfig
from streams.training.skew_watch import SkewWatch
from streams.training.trainer_thread import TrainerThread, in_thread

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.features.state_records import StateWrite, StateWriter
    from trainer.online.trainer import OnlineTrainer

TopicRecord = tuple[str, bytes, bytes | None]
"""Topic, key, and value or None for a tombstone."""

log = structlog.get_logger()

_LOOK_SECONDS = 60.0
_LEFT_SECONDS = 60.0
"""How long items may be left over before it is told."""
_SHORTEST_SECONDS = 1.0
"""Between two writes, however many takes come: each one carries the counts of all items together."""


class StatePublisher:
    """Writes the states that changed; one transaction is under way at a time, and training goes on meanwhile."""

    def __init__(
        self,
        leadership: Leadership,
        thread: TrainerThread,
        writer: StateWriter,
        config: TrainConsumerConfig,
        *,
        skew: SkewWatch,
        read: Callable[[StateWriter], Any],
        read_id: Callable[[], str],
        topic: str,
        clock: Callable[[], float],
    ) -> None:
        """`read` tells the writer all that the topic holds; `read_states` does. `read_id` asks for Kafka's id of the
        topic, and blocks.
        """
        self._leadership = leadership
        self._thread = thread
        self._writer = writer
        self._config = config
        self._skew = skew
        self._read = read
        self._read_id = read_id
        self._topic = topic
        self._since_write = IntervalTimer(config.states_every_seconds, clock)
        self._pause = IntervalTimer(min(_SHORTEST_SECONDS, config.states_every_seconds), clock)
        self._look = IntervalTimer(_LOOK_SECONDS, clock)
        self._look.begin()
        self._looking: asyncio.Task[str] | None = None
        self._complete = IntervalTimer(_LEFT_SECONDS, clock)
        self._complete.begin()
        self._topic_id: str | None = None
        self._writing: asyncio.Task[None] | None = None
        self._write: StateWrite | None = None
        self._outcomes: list[TopicRecord] = []
        self._takes = 0
        self._was_late = False

    async def open(self) -> None:
        """Read what the topics hold. Raises `Misconfigured` if one does not exist, `BrokerUnavailable`."""
        self._topic_id = await asyncio.to_thread(self._read_id)
        await self._read(self._writer)
        await self._skew.open()

    async def publish_if_due(self) -> None:
        """Begin a write if it is time. Raises `Fenced` if another process leads now."""
        await self._skew.poll()
        await self._look_at_topic()
        if self._writing is not None and self._writing.done():
            await self._settle()
        if self._writing is None and self._is_due:
            await self._begin()

    async def publish_rest(self, stop: asyncio.Event) -> None:
        """Write all that is left, and wait for it; a broker that is away is waited for no longer.

        Once `stop` is set, one write at most: the next trainer finds what is missing, and it waits for this one to end.
        """
        written = self._writing is None or await self._settle()
        while written:
            await self._begin()
            if self._writing is None:
                return
            written = await self._settle() and not stop.is_set()

    async def close(self) -> None:
        """Wait for no write any more, and disconnect."""
        for task in (self._writing, self._looking):
            if task is not None:
                task.cancel()
        await self._skew.close()

    async def _look_at_topic(self) -> None:
        """Write everything again where the topic was deleted and created again: of what did not change since, servers
        would never hear.
        """
        if self._looking is None and self._look.passed:
            self._look.begin()
            self._looking = asyncio.create_task(asyncio.to_thread(self._read_id))
        if self._looking is None or not self._looking.done():
            return
        looking, self._looking = self._looking, None
        try:
            found = await looking
        except (Unavailable, Misconfigured) as error:
            log.warning("train.states_topic_unknown", error=str(error))
            return
        if found != self._topic_id:
            log.warning("train.states_topic_replaced", topic=self._topic, help="all states are written again")
            self._topic_id = found
            self._writer.begin_anew()

    @property
    def _is_due(self) -> bool:
        trainer = self._thread.trainer
        if trainer is None or not self._pause.passed:
            return False
        takes = trainer.moment.shared.takes - self._writer.takes
        return bool(self._since_write.passed or takes >= self._config.states_every_takes or self._writer.left)

    async def _begin(self) -> None:
        trainer = self._thread.trainer
        if trainer is None:
            return
        self._pause.begin()
        moment = trainer.moment
        self._write = await in_thread(partial(self._next, trainer))
        self._say_late(self._write is None and self._writer.is_late(moment))
        if self._write is None:
            self._since_write.begin()
        records = [*self._outcomes]
        if self._write is not None:
            self._takes = moment.shared.takes
            records += [(self._topic, key, value) for key, value in self._write.records]
        if not records:
            return
        # not awaited: a broker that is away must not hold up what can be learned meanwhile
        self._writing = asyncio.create_task(self._leadership.transact(records))

    def _next(self, trainer: OnlineTrainer) -> StateWrite | None:
        """What to write now. Rows of the state that was kept are compared before another one is."""
        due = self._skew.due
        if due and (outcome := self._skew.compare(trainer)) is not None:
            self._outcomes.append(outcome)  # beside one that a broker that was away did not take
        return self._writer.next(trainer.moment, most=self._config.states_per_write, hold=due)

    async def _settle(self) -> bool:
        """Wait for the write that is under way; False if it could not be made."""
        assert self._writing is not None, "no write is under way"
        writing, self._writing = self._writing, None
        try:
            await writing
        except Unavailable as error:  # all of it is made again
            log.warning("train.states_delayed", error=str(error))
            return False
        self._outcomes = []
        self._since_write.begin()
        if self._write is None:
            return True
        self._writer.written(self._write, takes=self._takes)
        head = self._write.head
        if head.held:
            self._skew.begin(head)
        if head.left and self._complete.passed:
            log.warning(
                "train.states_left", items=head.left, help="more change than MIM_TRAIN__STATES_PER_WRITE a second"
            )
        if not head.left or self._complete.passed:
            self._complete.begin()
        log.debug("train.states_written", number=head.number, items=len(self._write.items), left=head.left)
        return True

    def _say_late(self, late: bool) -> None:
        if late and not self._was_late:
            log.info("train.states_ahead", help="the topic holds newer states; none is written before")
        self._was_late = late


async def read_states(broker: BrokerConfig, topics: TopicsConfig, writer: StateWriter) -> None:
    """Tell the writer all that `item-states` holds. Raises as `TopicFollower.open` does."""

    async def hear(records: Sequence[Any], source: str, after: int) -> None:
        for record in records:
            writer.heard(record.key, record.value)

    follower = TopicFollower(broker, topics, "item-states", hear)
    try:
        await follower.open()
        await follower.catch_up()
    finally:
        await follower.close()
