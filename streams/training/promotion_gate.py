"""Puts each candidate in shadow evaluation beside the serving release, and decides whether it replaces it.

```text
candidate ──> published, not served ──> shadow evaluation over the next rows ──> decision kept ──> promoted, or refused
```

A log that ends has no next rows for the last candidate. Its last rows are held back: the weights before them stand in
for the candidate and are compared on them, before they are learned from.

Without anything to compare with (the first release, or a serving one that cannot be loaded or reads other features)
the decision comes at once and says so. Shadow evaluations are part of the trainer's checkpoints; one that was cut short
goes on, and a decision that was made and not carried out is carried out. A stand-in begins anew.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable
from schemas.manifests import ModelManifest, PromotionDecision, TopicOffsets
from streams.stores.artifacts.artifact_store import NotFound
from streams.stores.artifacts.registry import ModelRegistry
from streams.training.release_publisher import ReleasePublisher
from trainer.online.gate import NO_ROWS, GateConfig, judge

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.shadow_evaluation import Release, ShadowEvaluation
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()

_READ = ("encoder_version", "dim", "features")
"""What releases that are compared on the same rows have in common."""


class PromotionGate:
    """Judges the candidates of one trainer, between two calls of it."""

    def __init__(self, registry: ModelRegistry, publisher: ReleasePublisher, config: GateConfig) -> None:
        self._registry = registry
        self._publisher = publisher
        self._config = config

    @property
    def last_rows(self) -> int:
        """How many of the last rows of a log the last candidate is compared on."""
        return self._config.trial_rows

    async def admit(
        self, trainer: OnlineTrainer, candidate: Candidate, offsets: TopicOffsets, *, more_rows: bool = True
    ) -> None:
        """Publish a candidate and begin its shadow evaluation, or decide at once without one to compare.

        Without `more_rows` the trainer's stand-in decides. Raises as `ReleasePublisher.publish` does.
        """
        published = await self._publisher.publish(candidate, offsets)
        manifest = published.manifest
        if published.decision is not None:
            if published.promotable:
                await self._publisher.carry_out(manifest, published.decision)
            return
        from trainer.online.shadow_evaluation import not_finite  # torch

        bad = not_finite(candidate.weights)
        if not more_rows and trainer.stand_in is not None:
            stand_in = trainer.stand_in
            rows, kinds = stand_in.compared, stand_in.compared_kinds
            decision = await asyncio.to_thread(
                judge, rows, self._config, against=stand_in.against, kinds=kinds, not_finite=bad
            )
            await self._conclude(manifest, decision)
            return
        shadow = None if bad else await self._evaluation((candidate.weights, manifest), self._config.trial_rows)
        if shadow is None or not more_rows:
            against = None if shadow is None else shadow.against
            await self._conclude(manifest, judge(NO_ROWS, self._config, against=against, not_finite=bad))
            return
        trainer.shadow = shadow
        log.info("train.on_trial", release_id=manifest.release_id, against=shadow.against.serving)

    async def begin_last_rows(self, trainer: OnlineTrainer) -> None:
        """Compare the weights as they are with the serving release on the rows that are held back.

        A candidate in shadow evaluation is given up: it would be decided on the rows that decide about its successor.
        Raises `StoreUnavailable`; it may be called again.
        """
        await self.give_up(trainer, "the log ended before it was compared, and a later candidate is")
        serving = await self._serving()
        trainer.stand_in = None
        if serving is not None:
            candidate, last_rows = await asyncio.to_thread(trainer.candidate), trainer.intake.last_rows
            about = {
                "config": candidate.config,
                "features": candidate.features,
                "last_event_at": None,  # it learned from rows before these, whatever their seconds
                "rows_trained": candidate.rows_trained + last_rows,
            }
            stand_in = (candidate.weights, serving[1].model_copy(update=about))
            trainer.stand_in = await self._evaluation(stand_in, None)
            log.info("train.last_rows", rows=last_rows, against=serving[1].release_id)
        trainer.intake.hold_back(0)

    async def give_up(self, trainer: OnlineTrainer, why: str) -> None:
        """Refuse the candidate in shadow evaluation, if there is one, without having compared it."""
        shadow = trainer.shadow
        if shadow is not None:
            refused = PromotionDecision(
                passed=False, reasons=[why], against=shadow.against.serving, rows=len(shadow.compared)
            )
            refused = await self._keep(shadow.candidate, refused)
            trainer.shadow = None
            await self._publisher.carry_out(shadow.candidate, refused)

    async def decide(self, trainer: OnlineTrainer) -> None:
        """Decide about the shadow evaluation as it stands, and carry that out.

        Raises `StoreUnavailable` if the decision cannot be kept; the evaluation then stays.
        """
        shadow = trainer.shadow
        if shadow is None:
            return
        rows, kinds = shadow.compared, shadow.compared_kinds
        decision = await asyncio.to_thread(judge, rows, self._config, against=shadow.against, kinds=kinds)
        decision = await self._keep(shadow.candidate, decision)
        trainer.shadow = None  # only now: a store that is away is asked again
        await self._publisher.carry_out(shadow.candidate, decision)

    async def resume(self, trainer: OnlineTrainer, state: State) -> None:
        """Continue the shadow evaluation of a checkpoint, unless it was decided since."""
        from trainer.online.shadow_evaluation import ShadowEvaluation, compared_with  # torch

        release_id, (against, best_id) = state.values["release_id"], compared_with(state)
        try:
            candidate = await asyncio.to_thread(self._registry.load, release_id)
            serving = await asyncio.to_thread(self._registry.load, against)
            best = None if best_id == against else await asyncio.to_thread(self._registry.load, best_id)
            published = await self._publisher.published(candidate[1])
            if published.decision is None:
                shadow = ShadowEvaluation(candidate, serving, best, rows_needed=self._config.trial_rows)
                shadow.restore(state)
                trainer.shadow = shadow
            elif published.promotable:
                await self._publisher.carry_out(published.manifest, published.decision)
        except (StoreUnavailable, Misconfigured, KeyError, ValueError) as error:
            log.warning("train.trial_lost", release_id=release_id, against=against, error=str(error))

    async def _serving(self) -> Release | None:
        """The current release; None if there is none, or if it is damaged or gone: it must not block others.

        Raises `StoreUnavailable` if the store does not answer.
        """

        def load() -> Release | None:
            pointer = self._registry.current()
            return None if pointer is None else self._registry.load(pointer.release_id)

        try:
            return await asyncio.to_thread(load)
        except (NotFound, Misconfigured) as error:
            log.warning("train.serving_release_not_loaded", error=str(error))
            return None

    async def _evaluation(self, candidate: Release, rows_needed: int | None) -> ShadowEvaluation | None:
        """The candidate beside the serving release and the best one; None if there is nothing to score beside it."""
        from trainer.online.shadow_evaluation import ShadowEvaluation  # torch

        serving = await self._serving()
        if serving is None:
            return None
        best = await self._best(serving[1])
        try:
            return ShadowEvaluation(candidate, serving, best, rows_needed=rows_needed)
        except Misconfigured as error:
            # the serving release cannot be scored here: it must not keep what is sound away for ever
            log.warning("train.not_compared", release_id=candidate[1].release_id, error=str(error))
            return None

    async def _best(self, serving: ModelManifest) -> Release | None:
        """The best release so far, if that is not the serving one, is kept, and reads the same vectors and features."""

        def load() -> Release | None:
            decision = self._registry.decision(serving.release_id)
            if decision is None or not decision.passed or decision.best is None:  # a person's choice stands for itself
                return None
            return self._registry.load(decision.best)

        try:
            best = await asyncio.to_thread(load)
        except (NotFound, Misconfigured) as error:
            log.info("train.best_release_not_loaded", error=str(error))
            return None
        if best is None or any(getattr(best[1], name) != getattr(serving, name) for name in _READ):
            return None
        return best

    async def _conclude(self, manifest: ModelManifest, decision: PromotionDecision) -> None:
        await self._publisher.carry_out(manifest, await self._keep(manifest, decision))

    async def _keep(self, manifest: ModelManifest, decision: PromotionDecision) -> PromotionDecision:
        """Keep the decision beside the manifest; the one that counts, if there was one before."""
        return await asyncio.to_thread(self._registry.record_decision, manifest.release_id, decision)
