"""What the trainer is given next: how much, which silence counts, and which embeddings timed out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.errors import Misconfigured
from streams.training.input import TrainingInput
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.partition_merge import Entry

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import OnlineTrainer

_MOST_EVENTS = 512


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """What the trainer is given beside the embeddings that came."""

    entries: Sequence[Entry]
    idle: Collection[int]
    """Partitions with nothing more to read."""
    timed_out: Collection[str]
    """Items whose embedding was waited for long enough."""
    finish: bool
    """Whether nothing more will ever come."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.entries or self.idle or self.timed_out or self.finish)


class Feed:
    """Cuts the input into batches; those of a bounded input have one size, whatever the fetches were."""

    def __init__(self, reads: TrainingInput, waits: EmbeddingWait, *, clock: Callable[[], float]) -> None:
        self._reads = reads
        self._waits = waits
        self._clock = clock
        self._chunk: list[Entry] = []

    def next(self, trainer: OnlineTrainer, missing: Collection[str]) -> FeedBatch:
        """The next batch; `missing` are the items whose embedding the trainer waits for.

        Raises `Misconfigured` if the trainer is full, and more events are the only thing that could help.
        """
        if self._may_feed(trainer, missing):
            self._fill()
        idle = self._reads.newly_idle(except_for={entry.partition for entry in self._chunk})
        timed_out = self._overdue(missing)
        finish = self._reads.bounded and self._reads.all_handed_out and not self._chunk
        entries: list[Entry] = []
        if self._is_due():
            entries, self._chunk = self._chunk, []
        return FeedBatch(entries, idle, timed_out, finish)

    def _may_feed(self, trainer: OnlineTrainer, missing: Collection[str]) -> bool:
        most, pending = trainer.config.max_pending, trainer.intake.pending
        if pending < most:
            return True
        if missing or self._reads.waits_for_silence:
            return False
        # full, and nothing else to wait for: only later events can move the window on
        if pending < 2 * most:
            return True
        raise Misconfigured(
            f"{pending} events wait in memory and event time does not move on: raise "
            "MIM_TRAINER__MAX_PENDING, or lower MIM_TRAINER__LATENESS_SECONDS and MIM_TRAINER__ATTRIBUTION_SECONDS"
        )

    def _fill(self) -> None:
        entries = self._reads.next_behaviours(_MOST_EVENTS - len(self._chunk))
        for entry in entries:
            if entry.behaviour is not None:
                self._waits.needed(entry.behaviour.item_id, entry.produced_at)
        self._chunk.extend(entries)

    def _is_due(self) -> bool:
        # a bounded run feeds chunks of one size, so that nothing at all depends on how the broker answers
        if not self._reads.bounded or self._reads.all_handed_out:
            return bool(self._chunk)
        return len(self._chunk) >= _MOST_EVENTS

    def _overdue(self, missing: Collection[str]) -> set[str]:
        if self._reads.bounded:
            return set(missing)  # all embeddings were read before: no other will come
        if not missing or not self._reads.embeddings_are_current:
            return set()
        return self._waits.overdue(missing, self._clock())
