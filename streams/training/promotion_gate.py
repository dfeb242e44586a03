"""Puts each candidate in shadow evaluation beside the serving release, and decides whether it replaces it.

```text
candidate ──> published, not served ──> shadow evaluation over the next rows ──> decision kept ──> promoted, or refused
```

Without anything to compare with (the first release, candidates in quick succession, the end of a bounded run) the
decision comes at once and says so. Shadow evaluations are part of the trainer's checkpoints; one that was cut short
goes on, and a decision that was made and not carried out is carried out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable
from schemas.manifests import ModelManifest, PromotionDecision, TopicOffsets
from streams.stores.artifacts.artifact_store import NotFound
from streams.stores.artifacts.registry import ModelRegistry, Weights
from streams.training.release_publisher import ReleasePublisher
from trainer.online.gate import NO_ROWS, GateConfig, judge

if TYPE_CHECKING:  # no command should pay for torch because of its imports
    from trainer.online.trainer import Candidate, OnlineTrainer
    from trainer.state import State

log = structlog.get_logger()


class PromotionGate:
    """Judges the candidates of one trainer, between two calls of it."""

    def __init__(self, registry: ModelRegistry, publisher: ReleasePublisher, config: GateConfig) -> None:
        self._registry = registry
        self._publisher = publisher
        self._config = config

    async def admit(
        self, trainer: OnlineTrainer, candidate: Candidate, offsets: TopicOffsets, *, more_rows: bool = True
    ) -> None:
        """Publish a candidate and begin its shadow evaluation, or decide at once without one to compare.

        Raises as `ReleasePublisher.publish` does.
        """
        published = await self._publisher.publish(candidate, offsets)
        manifest = published.manifest
        if published.decision is not None:
            if published.promotable:
                await self._publisher.carry_out(manifest, published.decision)
            return
        from trainer.online.shadow_evaluation import ShadowEvaluation, not_finite  # torch

        bad = not_finite(candidate.weights)
        slow = trainer.config.release_every_rows >= 2 * self._config.trial_rows
        serving = await self._serving() if more_rows and slow and not bad else None
        if serving is None:
            decision = judge(NO_ROWS, self._config, against=None, not_finite=bad)
            if not slow:
                remarks = ["not compared: candidates follow faster than trials"]
                decision = decision.model_copy(update={"remarks": remarks})
            await self._conclude(manifest, decision)
            return
        try:
            shadow = ShadowEvaluation((candidate.weights, manifest), serving, rows_needed=self._config.trial_rows)
        except Misconfigured as error:
            # the serving release cannot be scored here: it must not keep what is sound away for ever
            log.warning("train.not_compared", release_id=manifest.release_id, error=str(error))
            await self._conclude(manifest, judge(NO_ROWS, self._config, against=None))
            return
        trainer.shadow = shadow
        log.info("train.on_trial", release_id=manifest.release_id, against=shadow.against)

    async def decide(self, trainer: OnlineTrainer) -> None:
        """Decide about the shadow evaluation as it stands, and carry that out.

        Raises `StoreUnavailable` if the decision cannot be kept; the evaluation then stays.
        """
        shadow = trainer.shadow
        if shadow is None:
            return
        decision = await asyncio.to_thread(judge, shadow.compared, self._config, against=shadow.against)
        decision = await self._keep(shadow.candidate, decision)
        trainer.shadow = None  # only now: a store that is away is asked again
        await self._publisher.carry_out(shadow.candidate, decision)

    async def resume(self, trainer: OnlineTrainer, state: State) -> None:
        """Continue the shadow evaluation of a checkpoint, unless it was decided since."""
        from trainer.online.shadow_evaluation import ShadowEvaluation  # torch

        release_id, against = state.values["release_id"], state.values["against"]
        try:
            candidate = await asyncio.to_thread(self._registry.load, release_id)
            serving = await asyncio.to_thread(self._registry.load, against)
            published = await self._publisher.published(candidate[1])
            if published.decision is None:
                shadow = ShadowEvaluation(candidate, serving, rows_needed=self._config.trial_rows)
                shadow.restore(state)
                trainer.shadow = shadow
            elif published.promotable:
                await self._publisher.carry_out(published.manifest, published.decision)
        except (StoreUnavailable, Misconfigured, KeyError, ValueError) as error:
            log.warning("train.trial_lost", release_id=release_id, against=against, error=str(error))

    async def _serving(self) -> tuple[Weights, ModelManifest] | None:
        """The current release; None if there is none, or if it is damaged or gone: it must not block others.

        Raises `StoreUnavailable` if the store does not answer.
        """

        def load() -> tuple[Weights, ModelManifest] | None:
            pointer = self._registry.current()
            return None if pointer is None else self._registry.load(pointer.release_id)

        try:
            return await asyncio.to_thread(load)
        except (NotFound, Misconfigured) as error:
            log.warning("train.serving_release_not_loaded", error=str(error))
            return None

    async def _conclude(self, manifest: ModelManifest, decision: PromotionDecision) -> None:
        await self._publisher.carry_out(manifest, await self._keep(manifest, decision))

    async def _keep(self, manifest: ModelManifest, decision: PromotionDecision) -> PromotionDecision:
        """Keep the decision beside the manifest; the one that counts, if there was one before."""
        return await asyncio.to_thread(self._registry.record_decision, manifest.release_id, decision)
