"""Puts each candidate on trial beside the release that answers, and says what became of it.

```text
candidate ──> published, answering nobody ──> trial over the next rows ──> verdict attached ──> promoted, or kept
```

Without anything to compare with (the first release, candidates in quick succession, the end of a bounded run) the
verdict comes at once and says so. Trials are part of the trainer's snapshots; a trial that was cut short goes on, and a
verdict that was given and not carried out is carried out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable
from schemas.manifests import GateVerdict, ModelManifest, Offsets
from streams.training.releaser import Releaser
from trainer.online.gate import NO_ROWS, GateConfig, judge

if TYPE_CHECKING:
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()


class Gating:
    """Works on one trainer, between its turns."""

    def __init__(self, releaser: Releaser, config: GateConfig) -> None:
        self._releaser = releaser
        self._config = config
        self._on_trial: ModelManifest | None = None

    async def admit(
        self, trainer: OnlineTrainer, candidate: Candidate, offsets: Offsets, *, more_rows: bool = True
    ) -> None:
        """Publish a candidate and put it on trial, or decide at once where there is nothing to try it on.

        Raises as `Releaser.publish` does.
        """
        published = await self._releaser.publish(candidate, offsets)
        manifest = published.manifest
        if published.verdict is not None:
            if published.verdict.passed and not published.was_current:
                await self._releaser.carry_out(manifest, published.verdict)
            return
        from trainer.online.shadow_trial import Trial, not_finite  # torch

        bad = not_finite(candidate.weights)
        slow = trainer.config.release_every_rows >= 2 * self._config.trial_rows
        serving = await self._releaser.serving() if more_rows and slow and not bad else None
        if serving is None:
            verdict = judge(NO_ROWS, self._config, against=None, not_finite=bad)
            if not slow:
                verdict = verdict.model_copy(update={"remarks": ["not compared: candidates follow faster than trials"]})
            await self._conclude(manifest, verdict)
            return
        try:
            trainer.trial = Trial((candidate.weights, manifest), serving, rows_needed=self._config.trial_rows)
        except Misconfigured as error:
            # what answers cannot be scored here: it must not keep what is sound away for ever
            log.warning("train.not_compared", release_id=manifest.release_id, error=str(error))
            await self._conclude(manifest, judge(NO_ROWS, self._config, against=None))
            return
        self._on_trial = manifest
        log.info("train.on_trial", release_id=manifest.release_id, against=trainer.trial.against)

    async def decide(self, trainer: OnlineTrainer) -> None:
        """Give the verdict of the trial as it stands, and carry it out. Raises `StoreUnavailable`; the trial stays."""
        trial, manifest = trainer.trial, self._on_trial
        if trial is None or manifest is None:
            return
        verdict = await asyncio.to_thread(judge, trial.compared, self._config, against=trial.against)
        verdict = await self._releaser.attach(manifest, verdict)
        trainer.trial = self._on_trial = None  # only now: a store that is away is asked again
        await self._releaser.carry_out(manifest, verdict)

    async def go_on(self, trainer: OnlineTrainer, state: State) -> None:
        """Go on with the trial of a snapshot, unless it was decided since."""
        from trainer.online.shadow_trial import Trial  # torch

        release_id, against = state.values["release_id"], state.values["against"]
        try:
            candidate, serving = await self._releaser.both(release_id, against)
            published = await self._releaser.decided(candidate[1])
            if published is None:
                trial = Trial(candidate, serving, rows_needed=self._config.trial_rows)
                trial.restore(state)
                trainer.trial, self._on_trial = trial, candidate[1]
            elif published.verdict is not None and published.verdict.passed and not published.was_current:
                await self._releaser.carry_out(published.manifest, published.verdict)
        except (StoreUnavailable, Misconfigured, KeyError, ValueError) as error:
            log.warning("train.trial_lost", release_id=release_id, against=against, error=str(error))

    async def _conclude(self, manifest: ModelManifest, verdict: GateVerdict) -> None:
        await self._releaser.carry_out(manifest, await self._releaser.attach(manifest, verdict))
