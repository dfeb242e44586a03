"""Who may make which release the current one: rules from the pointer as it is to the pointer as it will be. No I/O.

Trainers come with Kafka's fence: a larger (producer id, epoch) pair wins, a smaller one is refused. People come with
the pointer as they saw it: if somebody moved it since, they are asked to look again. They leave the fence as it is, so
that a person's choice never lets an outdated trainer back in.

A pin keeps every trainer from moving the pointer; people may. `rollback` pins, because the next release of the trainer
that is running would otherwise undo it within minutes. A trainer that takes over puts its fence on a pinned pointer and
leaves the pin.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum

from pydantic import Field

from schemas.base import Message, UtcTime
from schemas.errors import Fenced, PipelineError
from schemas.manifests import RELEASE_ID, Fence, ModelManifest
from streams.stores.artifacts.config import NEW_STORE


class PointerAction(StrEnum):
    """What the last change of the pointer was."""

    RELEASED = "released"
    TAKEN_OVER = "taken over"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    PRUNED = "pruned"


class PromotionResult(StrEnum):
    """What became of a trainer's promotion."""

    MOVED = "moved"
    PINNED = "pinned"
    OVERTAKEN = "overtaken"
    """Another release answers than the one that the candidate was compared with."""


class CurrentPointer(Message):
    """Contents of `current.json`: what answers, and the whole story of the last change."""

    release_id: str = Field(pattern=RELEASE_ID)
    """The release to serve."""
    weights_sha256: str
    """Checksum of its weights."""
    fence: Fence | None = None
    """The newest trainer that wrote here; older ones are refused."""
    sequence: int = 0
    """Number of changes so far; names the note that keeps this state once it is replaced."""
    pinned: bool = False
    """Whether trainers have to leave the pointer alone."""
    action: PointerAction = PointerAction.RELEASED
    """What made it as it is."""
    by: str | None = None
    """Who did that."""
    at: UtcTime | None = None
    """When, by the wall clock of whoever did."""
    why: str | None = None
    """Why, in his words."""
    doomed: list[str] = Field(default_factory=list)
    """Releases that are being removed; none of them can become current any more."""


def released(
    before: CurrentPointer | None,
    manifest: ModelManifest,
    fence: Fence | None,
    *,
    against: str | None,
    by: str,
    at: datetime,
) -> CurrentPointer | PromotionResult:
    """A trainer's promotion; `against` names the release that the candidate was compared with, None if with none.

    Raises `Fenced` if the pointer was written under a larger fence.
    """
    refuse_smaller_fence(before, fence)
    if before is not None and before.release_id != manifest.release_id:
        if before.pinned:
            return PromotionResult.PINNED
        if against is not None and against != before.release_id:
            return PromotionResult.OVERTAKEN
    _refuse_doomed(before, manifest)
    return _after(before, manifest, action=PointerAction.RELEASED, by=by, at=at, why=None, fence=fence)


def taken_over(before: CurrentPointer, fence: Fence | None, *, by: str, at: datetime) -> CurrentPointer:
    """A trainer's fence on whatever is current. Raises `Fenced` as `released` does."""
    refuse_smaller_fence(before, fence)
    return before.model_copy(
        update={
            "fence": fence,
            "sequence": before.sequence + 1,
            "action": PointerAction.TAKEN_OVER,
            "by": by,
            "at": at,
            "why": None,
        }
    )


def chosen(
    before: CurrentPointer | None,
    manifest: ModelManifest,
    *,
    seen: CurrentPointer | None,
    rollback: bool,
    by: str,
    at: datetime,
    why: str | None,
) -> CurrentPointer:
    """A person's choice of a release; a rollback pins. Raises `PipelineError` if the pointer is not as `seen`."""
    refuse_unseen(before, seen)
    _refuse_doomed(before, manifest)
    if before is not None and before.release_id == manifest.release_id:
        raise PipelineError(f"{manifest.release_id} is the current release already")
    action = PointerAction.ROLLED_BACK if rollback else PointerAction.PROMOTED
    after = _after(
        before, manifest, action=action, by=by, at=at, why=why, fence=None if before is None else before.fence
    )
    return after.model_copy(update={"pinned": after.pinned or rollback})


def pinned(before: CurrentPointer | None, on: bool, *, by: str, at: datetime, why: str | None) -> CurrentPointer | None:
    """A person's pin set or taken away; None if it is so already."""
    if before is None:
        raise PipelineError("nothing has been released yet: there is nothing to pin")
    if before.pinned == on:
        return None
    action = PointerAction.PINNED if on else PointerAction.UNPINNED
    story = {"sequence": before.sequence + 1, "action": action, "by": by, "at": at, "why": why}
    return before.model_copy(update={"pinned": on, **story})


def pruned(
    before: CurrentPointer, releases: Sequence[ModelManifest], too_old: Sequence[str], *, by: str, at: datetime
) -> CurrentPointer | None:
    """The pointer that dooms what is `too_old`; None if nothing is to go.

    Releases are removed only after the pointer says so: a person who wants one of them back meanwhile is either
    earlier, and keeps it, or is told that it goes.
    """
    kept = {before.release_id, *(m.parent for m in releases if m.release_id == before.release_id)}
    there = {manifest.release_id for manifest in releases}
    doomed = sorted((set(too_old) | set(before.doomed)) & there - kept)
    if not doomed:
        return None
    story = {"sequence": before.sequence + 1, "action": PointerAction.PRUNED, "by": by, "at": at, "why": None}
    return before.model_copy(update={"doomed": doomed, **story})


def refuse_smaller_fence(before: CurrentPointer | None, fence: Fence | None) -> None:
    """Raise `Fenced` unless `fence` may replace what `before` was written under; the same holder may write again."""
    if before is None or before.fence is None:
        return
    if fence is None or fence.as_pair() < before.fence.as_pair():
        ours = "none" if fence is None else f"producer {fence.producer_id}, epoch {fence.epoch}"
        raise Fenced(
            f"release {before.release_id} was promoted by a later trainer (producer {before.fence.producer_id}, epoch "
            f"{before.fence.epoch}; ours: {ours}); if its Kafka cluster is gone for good, use "
            f"{NEW_STORE}"
        )


def refuse_unseen(before: CurrentPointer | None, seen: CurrentPointer | None) -> None:
    """Raise `PipelineError` if another release answers now than the one that a person saw."""
    now, then = (None if pointer is None else pointer.release_id for pointer in (before, seen))
    if now != then:
        raise PipelineError(f"the current release is {now} now, it was {then}: look again ('mimstream models list')")


def _refuse_doomed(before: CurrentPointer | None, manifest: ModelManifest) -> None:
    if before is not None and manifest.release_id in before.doomed:
        raise PipelineError(f"release {manifest.release_id} is being removed (MIM_MODELS__KEEP_RELEASES)")


def _after(
    before: CurrentPointer | None,
    manifest: ModelManifest,
    *,
    action: PointerAction,
    by: str,
    at: datetime,
    why: str | None,
    fence: Fence | None,
) -> CurrentPointer:
    return CurrentPointer(
        release_id=manifest.release_id,
        weights_sha256=manifest.weights_sha256,
        fence=fence,
        sequence=0 if before is None else before.sequence + 1,
        pinned=before is not None and before.pinned,
        action=action,
        by=by,
        at=at,
        why=why,
        doomed=[] if before is None else before.doomed,
    )
