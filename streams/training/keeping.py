"""What a trainer keeps while it runs: snapshots beside learning, and the journal of what each release is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Unavailable
from schemas.manifests import Offsets
from streams.training.checkpointing import Snapshots
from trainer.samples.join_rules import JoinRules

if TYPE_CHECKING:
    from trainer.online.trainer import OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()


class Keeping:
    """One snapshot is written at a time. A disk that is full costs the snapshot, not the one before it."""

    def __init__(self, snapshots: Snapshots, *, every_events: int, begins: Mapping[int, int]) -> None:
        self._snapshots = snapshots
        self._every_events = every_events
        self._received = 0
        self._writing: asyncio.Task[None] | None = None
        self.begins = dict(begins)
        """Per partition of `behaviours`, where this lineage of snapshots began to read."""

    def stand_at(self, trainer: OnlineTrainer, begins: Mapping[str, int]) -> None:
        """The trainer stands where a snapshot was taken."""
        self._received = trainer.accounts.received
        self.begins = {int(number): offset for number, offset in begins.items()}

    def due(self, trainer: OnlineTrainer) -> bool:
        """Whether enough was read since the last snapshot, and none is being written."""
        return self._writing is None and trainer.accounts.received - self._received >= self._every_events

    async def snapshot(
        self, trainer: OnlineTrainer, copy: Callable[[], Awaitable[State]], offsets: Callable[[], Offsets]
    ) -> None:
        """Copy everything between two turns, and write it beside what goes on."""
        await self.written()
        self._received = trainer.accounts.received
        state = await copy()
        about = offsets(), trainer.encoder_version, trainer.catalogue.dim, trainer.rows, trainer.rows_sha256

        def write() -> None:
            at, version, dim, rows, rows_sha256 = about
            self._snapshots.write(state, at, encoder_version=version, dim=dim, rows=rows, rows_sha256=rows_sha256)

        self._writing = asyncio.create_task(asyncio.to_thread(write))

    @property
    def just_written(self) -> bool:
        """Whether a snapshot has come to its end that `written` has not told of."""
        return self._writing is not None and self._writing.done()

    async def written(self) -> bool:
        """Wait until the snapshot that is being written is written; False if it could not be.

        Raises `Fenced` if a later trainer writes here, `Misconfigured` if the log was replaced.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return True
        try:
            await writing
        except Unavailable as error:  # the broker counts too: it is asked whether the log is still the same
            log.warning("snapshot.not_written", error=str(error))
            return False
        return True

    async def segment(self, trainer: OnlineTrainer, ends: Mapping[int, int]) -> bool:
        """Keep the journal of the rows that the next release adds; False if it cannot be written now."""
        try:
            await asyncio.to_thread(
                self._snapshots.keep_segment,
                trainer.segment(),
                begins=self.begins,
                ends=ends,
                overtaken=trainer.overtaken,
                rules=JoinRules.of(trainer.config, self.begins).settings,
                encoder_version=trainer.encoder_version,
                dim=trainer.catalogue.dim,
            )
        except Unavailable as error:
            log.warning("journal.not_written", error=str(error))
            return False
        return True

    async def forget_segments_but(self, kept: Callable[[], Awaitable[Collection[str]]]) -> None:
        """Forget the journals of releases that are gone; `kept` asks for the others. Raises `StoreUnavailable`."""
        present = await asyncio.to_thread(self._snapshots.segments_present)
        await asyncio.to_thread(self._snapshots.forget_segments_but, await kept(), present)

    def cancel(self) -> None:
        """Wait for nothing any more."""
        if self._writing is not None:
            self._writing.cancel()
