"""What the trainer is given next: how much, which silence counts, and which embeddings timed out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured
from streams.runtime.interval import IntervalTimer
from streams.training.input import TrainingInput
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.partition_merge import Entry
from trainer.samples.searches import searched

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import OnlineTrainer

log = structlog.get_logger()

_MOST_EVENTS = 512
_FULL_LINE_SECONDS = 60.0


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
        self._partial = False
        self._full_line = IntervalTimer(_FULL_LINE_SECONDS, clock)

    def next(self, trainer: OnlineTrainer, missing: Collection[str]) -> FeedBatch:
        """The next batch; `missing` are the items whose embedding the trainer waits for.

        Raises `Misconfigured` if the trainer is full, and more events are the only thing that could help.
        """
        if not self._is_full(trainer):
            self._fill(trainer)
        elif not missing and self._may_exceed(trainer):
            # the partitions ahead would fill the memory further, and event time does not wait for them
            self._fill(trainer, only=trainer.intake.window.slowest or None)
        idle = self._reads.newly_idle(except_for={entry.partition for entry in self._chunk})
        timed_out = self._overdue(missing)
        finish = self._reads.bounded and self._reads.all_handed_out and not self._chunk
        entries: list[Entry] = []
        if self._is_due():
            entries, self._chunk = self._chunk, []
        return FeedBatch(entries, idle, timed_out, finish)

    def _is_full(self, trainer: OnlineTrainer) -> bool:
        return trainer.intake.pending_bytes >= 1e6 * trainer.config.pending_megabytes

    def _may_exceed(self, trainer: OnlineTrainer) -> bool:
        """Whether more may be held than there is room for.

        What was read ahead of the slowest partitions takes no more than there is room for. Beyond twice as much, what
        comes in the time that each event has to wait does not fit by itself, and nothing but more memory can help.
        """
        config, held = trainer.config, trainer.intake.pending_bytes
        slowest = sorted(trainer.intake.window.slowest)
        if held < 2e6 * config.pending_megabytes:
            if self._full_line.passed:
                self._full_line.begin()
                log.warning("train.memory_short", held_megabytes=round(held / 1e6), only_read=slowest)
            return True
        if self._reads.waits_for_silence:
            return False
        spans = {"LATENESS_SECONDS": config.lateness_seconds, "ATTRIBUTION_SECONDS": config.attribution_seconds}
        if config.draw_exposures:
            spans["DRAW_WINDOW_SECONDS"] = config.draw_window_seconds
        names = ", ".join(f"MIM_TRAINER__{name}" for name in spans)
        raise Misconfigured(
            f"{trainer.intake.pending} events take {held / 1e6:.0f} MB of memory: each waits "
            f"{sum(spans.values()):.0f} s of event time ({' + '.join(spans)}), and more come in that time than "
            f"MIM_TRAINER__PENDING_MEGABYTES={config.pending_megabytes:g} holds, even twice. Raise it, or lower {names}"
        )

    def _fill(self, trainer: OnlineTrainer, *, only: Collection[int] | None = None) -> None:
        self._partial = only is not None
        entries = self._reads.next_behaviours(_MOST_EVENTS - len(self._chunk), only=only)
        for entry in entries:
            if (behaviour := entry.behaviour) is None:
                continue
            named = [behaviour.item_id]
            if trainer.config.features.queries:
                query = searched(behaviour.query_text, behaviour.query_image)
                named += [] if query is None else [query]
            for name in named:
                if not trainer.catalogue.holds(name):
                    self._waits.needed(name, entry.produced_at)
        self._chunk.extend(entries)

    def _is_due(self) -> bool:
        # a bounded run feeds chunks of one size, so that nothing at all depends on how the broker answers
        if not self._reads.bounded or self._reads.all_handed_out or self._partial:
            return bool(self._chunk)
        return len(self._chunk) >= _MOST_EVENTS

    def _overdue(self, missing: Collection[str]) -> set[str]:
        if self._reads.bounded:
            return set(missing)  # all embeddings were read before: no other will come
        if not missing or not self._reads.embeddings_are_current:
            return set()
        return self._waits.overdue(missing, self._clock())
