"""Publishing: artifacts first, then Kafka's confirmation that this process still leads, then the pointer.

```text
publish             makes the release readable; nothing points to it
decision            of the promotion gate (`streams.training.promotion_gate`); the first one counts
notice on `models`  in a transaction; a superseded trainer is refused here
promote pointer     if the gate passed it; one that was stopped between the two has a smaller fence and is refused,
                    and a pinned pointer stays
```

A candidate that is made again, because the trainer restarted and learned the same rows again, is recognised by its
weights and rows: it keeps the number and the decision that it had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable, Unavailable
from schemas.manifests import ModelManifest, PromotionDecision, ReleaseNotice, TopicOffsets, running_number
from streams.broker.cluster import ClusterTopics
from streams.broker.leadership import Leadership
from streams.stores.artifacts.artifact_store import NotFound
from streams.stores.artifacts.config import NEW_STORE
from streams.stores.artifacts.promotion import PromotionResult
from streams.stores.artifacts.registry import ModelRegistry, pack_weights, weights_checksum
from streams.training.config import ANEW

if TYPE_CHECKING:
    from trainer.online.trainer import Candidate

log = structlog.get_logger()


def _probe(candidate: Candidate) -> list[float]:
    from trainer.features.config import FeatureConfig
    from trainer.features.probe import probe  # numpy

    return probe(FeatureConfig.model_validate(candidate.config["features"]))


_HELD = {
    PromotionResult.PINNED: "the current release is pinned ('mimstream models unpin')",
    PromotionResult.OVERTAKEN: "another release was chosen by hand while it was compared",
}


@dataclass(frozen=True, slots=True)
class Published:
    """A release that is readable, and what was decided about it before."""

    manifest: ModelManifest
    decision: PromotionDecision | None
    """The gate's decision; None before it."""
    was_current: bool
    """Whether the pointer ever came to it."""

    @property
    def promotable(self) -> bool:
        """Whether the gate passed it and the pointer never came to it."""
        return self.decision is not None and self.decision.passed and not self.was_current


class ReleasePublisher:
    """Releases candidates under this process's fence, each further along the log than the release before.

    With `replace` also what goes no further than what was released from this log before.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        leadership: Leadership,
        *,
        notices_topic: str,
        read_log: Callable[[], ClusterTopics],
        clock: Callable[[], float],
        replace: bool = False,
    ) -> None:
        self._registry = registry
        self._leadership = leadership
        self._notices_topic = notices_topic
        self._read_log = read_log
        self._clock = clock
        self._replace = replace
        self._log: ClusterTopics | None = None
        self._vectors: tuple[str, int] | None = None
        self._floor: dict[int, int] = {}
        self._current: ModelManifest | None = None
        self._unfinished: tuple[ModelManifest, PromotionDecision] | None = None
        self.released = 0
        """Releases made by this process that became current."""
        self.refused = 0
        """Candidates that the promotion gate kept back."""
        self.held = 0
        """Candidates that passed and did not become current, because a person had chosen otherwise."""
        self.not_serving: str | None = None
        """Why the newest candidate does not serve; None if it does, or if there was none."""

    @property
    def current_id(self) -> str | None:
        """The current release, as far as this process knows."""
        return None if self._current is None else self._current.release_id

    async def take_over(self, *, encoder_version: str, dim: int) -> None:
        """Read what is current, and put our own fence on it: from here on an earlier trainer cannot move the pointer.

        The releases go with vectors of that encoder and width. Raises `Misconfigured` if the current release comes from
        another log or goes with other vectors.
        """
        log_now = await asyncio.to_thread(self._read_log)
        current = await asyncio.to_thread(self._find_current)
        if current is not None:
            which = f"the current release {current.release_id}"
            log_now.refuse_other(which, current.cluster_id, current.topic_ids, or_else=f"train anew with {ANEW}")
            if (current.encoder_version, current.dim) != (encoder_version, dim):
                raise Misconfigured(
                    f"{which} goes with vectors of encoder {current.encoder_version} ({current.dim}-d), this trainer "
                    f"reads {encoder_version} ({dim}-d). Set MIM_TRAIN__ENCODER_VERSION to the former, or train anew "
                    f"with {ANEW}"
                )
            self._floor = await asyncio.to_thread(self._decided_floor, log_now)
            await asyncio.to_thread(self._registry.take_over, self._leadership.fence)
        self._log, self._vectors, self._current = log_now, (encoder_version, dim), current

    @property
    def taken_over(self) -> bool:
        """Whether `take_over` came to its end: releases can be published."""
        return self._log is not None

    def beyond_current(self, offsets: Mapping[int, int]) -> bool:
        """Whether these offsets of `behaviours` lie beyond those of each release that was decided about.

        These are the current one, those that were current before, and those that the gate refused: what a person rolled
        back does not come back because a trainer restarts and learns the same rows again.
        """
        if self._replace or not self._floor:
            return True
        ahead = any(offset > self._floor.get(partition, 0) for partition, offset in offsets.items())
        behind = any(offsets.get(partition, 0) < floor for partition, floor in self._floor.items())
        return ahead and not behind

    async def say_not_beyond(self, candidate: Candidate) -> None:
        """Say that this candidate is not released, unless it is one of the releases. Raises `StoreUnavailable`."""
        if await asyncio.to_thread(self._find, candidate, None) is None:
            self.not_serving = (
                "nothing was released: this run goes no further in the log than what was released from it before. To "
                "have its releases all the same, compared with the serving one: --replace, or "
                f"{NEW_STORE}"
            )
            log.warning("train.not_beyond", floor=self._floor, current=self.current_id, help=self.not_serving)

    async def publish(self, candidate: Candidate, offsets: TopicOffsets) -> Published:
        """Make a candidate readable. One of the same weights and rows that is there already keeps its number.

        Raises `Misconfigured` if the log was replaced meanwhile, `StoreUnavailable`.
        """
        return await asyncio.to_thread(self._publish, candidate, offsets)

    async def published(self, manifest: ModelManifest) -> Published:
        """What was decided about a release that was published. Raises `StoreUnavailable`."""
        return await asyncio.to_thread(self._published, manifest)

    async def carry_out(self, manifest: ModelManifest, decision: PromotionDecision) -> PromotionResult | None:
        """Announce, and promote if the gate passed it; None if it was refused, or if something does not answer.

        In the latter case `unfinished` says so, and `finish()` goes on where it stopped. Raises `Fenced` if another
        trainer leads now.
        """
        self._unfinished = (manifest, decision)
        try:
            return await self.finish()
        except Unavailable as error:
            log.warning("train.release_delayed", error=str(error))
            return None

    @property
    def unfinished(self) -> bool:
        """Whether a release was published and could not be announced or promoted yet."""
        return self._unfinished is not None

    async def finish(self) -> PromotionResult | None:
        """Announce and promote what was published. May be repeated."""
        if self._unfinished is None:
            return None
        manifest, decision = self._unfinished
        notice = ReleaseNotice(
            release_id=manifest.release_id,
            weights_sha256=manifest.weights_sha256,
            encoder_version=manifest.encoder_version,
            released_at=manifest.created_at,
            passed=decision.passed,
        )
        await self._leadership.transact(
            [(self._notices_topic, manifest.release_id.encode(), notice.model_dump_json().encode())]
        )
        result = None
        if decision.passed:
            result = await asyncio.to_thread(
                self._registry.promote, manifest.release_id, self._leadership.fence, against=decision.against
            )
        else:
            await asyncio.to_thread(self._registry.prune)
        self._unfinished = None
        self._floor = manifest.offsets.get("behaviours", {})
        figures = {name: value and round(value, 4) for name, value in (manifest.metrics | decision.figures).items()}
        about: dict[str, object] = {"release_id": manifest.release_id, "rows": manifest.rows_trained, **figures}
        self.not_serving = None
        if result is PromotionResult.MOVED:
            self._current = manifest
            self.released += 1
            log.info(
                "train.released",
                steps=manifest.steps,
                last_event_at=manifest.last_event_at and manifest.last_event_at.isoformat(),
                remarks=decision.remarks,
                **about,
            )
        elif result is None:
            self.refused += 1
            self.not_serving = f"{manifest.release_id} was refused: {'; '.join(decision.reasons)}"
            log.error("train.refused", against=decision.against, reasons=decision.reasons, **about)
        else:
            self.held += 1
            self.not_serving = f"{manifest.release_id} passed and does not serve: {_HELD[result]}"
            log.warning("train.held", why=str(result), against=decision.against, **about)
        return result

    async def segments(self) -> set[str]:
        """Journal segments of the releases that are kept. Raises `StoreUnavailable`."""
        return {manifest.segment for manifest in await asyncio.to_thread(self._registry.list) if manifest.segment}

    def _publish(self, candidate: Candidate, offsets: TopicOffsets) -> Published:
        assert self._log is not None, "take_over comes first"
        assert self._vectors is not None, "take_over comes first"
        self._log.refuse_replaced(self._read_log(), way_out=f"Start `mimstream train` again, with {ANEW}")
        checksum = weights_checksum(pack_weights(candidate.weights))
        kept = self._registry.list()
        found = self._find(candidate, kept)
        if found is not None:
            return self._published(found)
        pointer = self._registry.current()
        manifest = ModelManifest(
            release_id=f"r{self._next_number(kept):06d}-{checksum[:12]}",
            weights_sha256=checksum,
            parent=None if pointer is None else pointer.release_id,
            encoder_version=self._vectors[0],
            dim=self._vectors[1],
            features=candidate.features,
            feature_probe=None if candidate.features is None else _probe(candidate),
            created_at=datetime.fromtimestamp(self._clock(), UTC),
            first_event_at=_moment(candidate.first_event_at),
            last_event_at=_moment(candidate.last_event_at),
            rows_trained=candidate.rows_trained,
            steps=candidate.steps,
            rows_sha256=candidate.rows_sha256,
            rows_tree_sha256=None if candidate.segment is None else candidate.segment.root,
            segment=None if candidate.segment is None else candidate.segment.name,
            offsets=offsets,
            cluster_id=self._log.cluster_id,
            topic_ids=self._log.topic_ids,
            config=candidate.config,
            metrics=candidate.metrics,
            fence=self._leadership.fence,
        )
        self._registry.publish(candidate.weights, manifest)
        return Published(manifest, None, was_current=False)

    def _find(self, candidate: Candidate, kept: Sequence[ModelManifest] | None) -> ModelManifest | None:
        """The kept release of the same weights and rows, if there is one."""
        same = (weights_checksum(pack_weights(candidate.weights)), candidate.rows_sha256)
        for manifest in reversed(self._registry.list() if kept is None else kept):
            if (manifest.weights_sha256, manifest.rows_sha256) == same:
                return manifest
        return None

    def _published(self, manifest: ModelManifest) -> Published:
        was_current = manifest.release_id in self._registry.been_current()
        return Published(manifest, self._registry.decision(manifest.release_id), was_current=was_current)

    def _next_number(self, kept: Sequence[ModelManifest]) -> int:
        known = [manifest.release_id for manifest in kept] + ([self.current_id] if self.current_id else [])
        return 1 + max(map(running_number, known), default=0)

    def _decided_floor(self, log_now: ClusterTopics) -> dict[int, int]:
        """Offsets of the newest release of this log that was current once, or refused."""
        been_current = self._registry.been_current()
        for manifest in reversed(self._registry.list()):
            if not log_now.has_incarnations(manifest.cluster_id, manifest.topic_ids):
                continue
            decision = self._registry.decision(manifest.release_id)
            if manifest.release_id in been_current or (decision is not None and not decision.passed):
                return manifest.offsets.get("behaviours", {})
        return {}

    def _find_current(self) -> ModelManifest | None:
        pointer = self._registry.current()
        if pointer is None:
            return None
        try:
            return self._registry.manifest(pointer.release_id)
        except NotFound:
            raise StoreUnavailable(
                "model store",
                f"the pointer names {pointer.release_id}, which is not there (MIM_MODELS__FOLDER or MIM_MODELS__URL): "
                "restore it, or remove the pointer to start anew",
            ) from None


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
