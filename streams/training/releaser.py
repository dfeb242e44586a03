"""Releases: folder first, then Kafka's word that we still lead, then the pointer.

```text
publish folder      harmless: nothing points to it
attach verdict      of the promotion gate (`streams.training.release_schedule`); the first one counts
notice on `models`  in a transaction; a superseded trainer is refused here
promote pointer     if it passed the gate; refuses a smaller fence, for the one that was stopped between the two, and
                    leaves a pinned pointer alone
```

A candidate that is made again, because the trainer restarted and learned the same rows again, is recognised by its
weights and rows: it keeps the number and the verdict that it had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from schemas.errors import Misconfigured, StoreUnavailable, Unavailable
from schemas.manifests import ModelManifest, PromotionDecision, ReleaseNotice, TopicOffsets
from streams.broker.cluster import ClusterTopics
from streams.broker.leadership import Leadership
from streams.stores.artifacts.artifact_store import NotFound
from streams.stores.artifacts.promotion import PromotionResult
from streams.stores.artifacts.registry import ModelRegistry, Weights, pack_weights, weights_checksum
from streams.training.config import ANEW

if TYPE_CHECKING:
    from trainer.online.trainer import Candidate

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Published:
    """A release that is readable, and what is known of it already."""

    manifest: ModelManifest
    verdict: PromotionDecision | None
    """What the gate said, if it has."""
    was_current: bool
    """Whether the pointer ever came to it."""


class ReleasePublisher:
    """Releases candidates under this process's fence, each further along the log than the release before."""

    def __init__(
        self,
        store: ModelRegistry,
        leadership: Leadership,
        *,
        notices_topic: str,
        read_log: Callable[[], ClusterTopics],
        encoder_version: str,
        dim: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._leadership = leadership
        self._notices_topic = notices_topic
        self._read_log = read_log
        self._encoder_version = encoder_version
        self._dim = dim
        self._clock = clock
        self._log: ClusterTopics | None = None
        self._floor: dict[int, int] = {}
        self._current: ModelManifest | None = None
        self._unfinished: tuple[ModelManifest, PromotionDecision] | None = None
        self.released = 0
        """Releases made by this process that became current."""
        self.refused = 0
        """Candidates that the promotion gate kept back."""
        self.held = 0
        """Candidates that passed and did not become current, because a person had chosen otherwise."""

    @property
    def current_id(self) -> str | None:
        """The current release, as far as this process knows."""
        return None if self._current is None else self._current.release_id

    async def take_over(self) -> None:
        """Learn what is current, and put our own fence on it: from here on an earlier trainer cannot move the pointer.

        Raises `Misconfigured` if the current release comes from another log or for another encoder.
        """
        self._log = await asyncio.to_thread(self._read_log)
        self._current = await asyncio.to_thread(self._find_current)
        if self._current is None:
            return
        self._refuse_foreign(self._current)
        self._floor = await asyncio.to_thread(self._settled_floor)
        await asyncio.to_thread(self._store.take_over, self._leadership.fence)

    def beyond_current(self, offsets: Mapping[int, int]) -> bool:
        """Whether a model trained up to these offsets of `behaviours` knows more than each release that was decided on.

        Decided on are the current one, those that were current before, and those that the gate refused: what a person
        rolled back does not come back because a trainer restarts and learns the same rows again.
        """
        if not self._floor:
            return True
        ahead = any(offset > self._floor.get(partition, 0) for partition, offset in offsets.items())
        behind = any(offsets.get(partition, 0) < floor for partition, floor in self._floor.items())
        return ahead and not behind

    async def publish(self, candidate: Candidate, offsets: TopicOffsets) -> Published:
        """Make a candidate readable. One of the same weights and rows that is there already keeps its number.

        Raises `Misconfigured` if the log was replaced meanwhile, `StoreUnavailable`.
        """
        return await asyncio.to_thread(self._publish, candidate, offsets)

    async def decided(self, manifest: ModelManifest) -> Published | None:
        """What was decided about a release that was published; None if nothing was yet."""
        published = await asyncio.to_thread(self._published, manifest)
        return None if published.verdict is None else published

    async def attach(self, manifest: ModelManifest, verdict: PromotionDecision) -> PromotionDecision:
        """Keep the verdict beside the manifest; the one that counts, if there was one before."""
        return await asyncio.to_thread(self._store.record_decision, manifest.release_id, verdict)

    async def carry_out(self, manifest: ModelManifest, verdict: PromotionDecision) -> PromotionResult | None:
        """Announce, and promote if the gate let it pass; None if it was refused, or if something does not answer.

        In the latter case `unfinished` says so, and `finish()` goes on where it stopped. Raises `Fenced` if another
        trainer leads now.
        """
        self._unfinished = (manifest, verdict)
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
        manifest, verdict = self._unfinished
        notice = ReleaseNotice(
            release_id=manifest.release_id,
            weights_sha256=manifest.weights_sha256,
            encoder_version=manifest.encoder_version,
            released_at=manifest.created_at,
            passed=verdict.passed,
        )
        await self._leadership.transact(
            [(self._notices_topic, manifest.release_id.encode(), notice.model_dump_json().encode())]
        )
        outcome = None
        if verdict.passed:
            outcome = await asyncio.to_thread(
                self._store.promote, manifest.release_id, self._leadership.fence, against=verdict.against
            )
        else:
            await asyncio.to_thread(self._store.prune)
        self._unfinished = None
        self._floor = manifest.offsets.get("behaviours", {})
        figures = {name: value and round(value, 4) for name, value in (manifest.metrics | verdict.figures).items()}
        about: dict[str, object] = {"release_id": manifest.release_id, "rows": manifest.rows_trained, **figures}
        if outcome is PromotionResult.MOVED:
            self._current = manifest
            self.released += 1
            log.info(
                "train.released",
                steps=manifest.steps,
                last_event_at=manifest.last_event_at and manifest.last_event_at.isoformat(),
                remarks=verdict.remarks,
                **about,
            )
        elif outcome is None:
            self.refused += 1
            log.error("train.refused", against=verdict.against, reasons=verdict.reasons, **about)
        else:
            self.held += 1
            log.warning("train.held", why=str(outcome), against=verdict.against, **about)
        return outcome

    async def segments(self) -> set[str]:
        """Journal segments of the releases that are kept. Raises `StoreUnavailable`."""
        return {manifest.segment for manifest in await asyncio.to_thread(self._store.list) if manifest.segment}

    async def serving(self) -> tuple[Weights, ModelManifest] | None:
        """The release that answers; None if there is none, or if it is damaged or gone: it must not block others.

        Raises `StoreUnavailable` if the store does not answer.
        """

        def load() -> tuple[Weights, ModelManifest] | None:
            pointer = self._store.current()
            return None if pointer is None else self._store.load(pointer.release_id)

        try:
            return await asyncio.to_thread(load)
        except (NotFound, Misconfigured) as error:
            log.warning("train.serving_release_not_loaded", error=str(error))
            return None

    async def both(
        self, release_id: str, other: str
    ) -> tuple[tuple[Weights, ModelManifest], tuple[Weights, ModelManifest]]:
        """Two releases. Raises as `ModelRegistry.load` does."""
        return await asyncio.to_thread(lambda: (self._store.load(release_id), self._store.load(other)))

    def _publish(self, candidate: Candidate, offsets: TopicOffsets) -> Published:
        if self._read_log() != self._log:
            raise Misconfigured(
                "a topic was deleted and created again while training: offsets and rows no longer belong to it. Start "
                f"`mimstream train` again, with {ANEW}"
            )
        assert self._log is not None, "take_over comes first"
        checksum = weights_checksum(pack_weights(candidate.weights))
        kept = self._store.list()
        for manifest in reversed(kept):
            if (manifest.weights_sha256, manifest.rows_sha256) == (checksum, candidate.rows_sha256):
                return self._published(manifest)
        pointer = self._store.current()
        manifest = ModelManifest(
            release_id=f"r{self._next_number(kept):06d}-{checksum[:12]}",
            weights_sha256=checksum,
            parent=None if pointer is None else pointer.release_id,
            encoder_version=self._encoder_version,
            dim=self._dim,
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
        self._store.publish(candidate.weights, manifest)
        return Published(manifest, None, was_current=False)

    def _published(self, manifest: ModelManifest) -> Published:
        was_current = manifest.release_id in self._store.been_current()
        return Published(manifest, self._store.decision(manifest.release_id), was_current=was_current)

    def _next_number(self, kept: Sequence[ModelManifest]) -> int:
        known = [manifest.release_id for manifest in kept] + ([self.current_id] if self.current_id else [])
        return 1 + max((int(release_id[1:7]) for release_id in known), default=0)

    def _settled_floor(self) -> dict[int, int]:
        """Offsets of the newest release of this log that was current once, or refused."""
        assert self._log is not None
        been_current = self._store.been_current()
        for manifest in reversed(self._store.list()):
            if (manifest.cluster_id, manifest.topic_ids) != (self._log.cluster_id, self._log.topic_ids):
                continue
            verdict = self._store.decision(manifest.release_id)
            if manifest.release_id in been_current or (verdict is not None and not verdict.passed):
                return manifest.offsets.get("behaviours", {})
        return {}

    def _find_current(self) -> ModelManifest | None:
        pointer = self._store.current()
        if pointer is None:
            return None
        try:
            return self._store.manifest(pointer.release_id)
        except NotFound:
            raise StoreUnavailable(
                "model store",
                f"the pointer names {pointer.release_id}, which is not there (MIM_MODELS__FOLDER or MIM_MODELS__URL): "
                "restore it, or remove the pointer to start anew",
            ) from None

    def _refuse_foreign(self, current: ModelManifest) -> None:
        assert self._log is not None
        if (current.cluster_id, current.topic_ids) != (self._log.cluster_id, self._log.topic_ids):
            raise Misconfigured(
                f"the current release {current.release_id} was trained from other topics, in cluster "
                f"{current.cluster_id}: its offsets mean nothing in cluster {self._log.cluster_id}. Train "
                f"anew with {ANEW}, or set MIM_KAFKA__BOOTSTRAP_SERVERS and MIM_TOPICS__PREFIX to where it came from"
            )
        if (current.encoder_version, current.dim) != (self._encoder_version, self._dim):
            raise Misconfigured(
                f"the current release {current.release_id} goes with vectors of encoder {current.encoder_version} "
                f"({current.dim}-d), this trainer reads {self._encoder_version} ({self._dim}-d). Set "
                f"MIM_TRAIN__ENCODER_VERSION to the former, or train anew with {ANEW}"
            )


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
