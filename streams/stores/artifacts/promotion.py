"""Rules for the pointer to the current release: each function takes the present pointer and returns the next. No I/O.

A trainer's change carries its fence: a larger term wins, a smaller one is refused. A user's
change carries the pointer that the user saw: if it was moved since, the change is refused. It keeps the fence, so that
a choice by hand never lets a superseded trainer back in.

A pin keeps every trainer from moving the pointer; users still can. `rollback` pins, because the next release of the
running trainer would otherwise undo it within minutes. A trainer that takes over puts its fence on a pinned pointer and
keeps the pin.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum

from pydantic import Field

from schemas.base import Message, UtcTime
from schemas.errors import PipelineError
from schemas.manifests import RELEASE_ID, Fence, ModelManifest
from streams.stores.artifacts.artifact_store import in_order
from streams.stores.artifacts.pointer import refuse_smaller_fence


class PointerAction(StrEnum):
    """Kind of the last change of the pointer."""

    RELEASED = "released"
    TAKEN_OVER = "taken over"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    PRUNED = "pruned"


class PromotionResult(StrEnum):
    """Result of a trainer's promotion."""

    MOVED = "moved"
    PINNED = "pinned"
    OVERTAKEN = "overtaken"
    """The current release is not the one that the candidate was compared with."""


class CurrentPointer(Message):
    """Contents of `current.json`: the current release, and the last change of the pointer."""

    release_id: str = Field(pattern=RELEASE_ID)
    """The release to serve."""
    weights_sha256: str
    """Checksum of its weights."""
    fence: Fence | None = None
    """Fence of the newest trainer that wrote here; older ones are refused."""
    sequence: int = 0
    """Number of changes so far; names the audit record of this state once it is replaced."""
    pinned: bool = False
    """Whether trainers must not move the pointer."""
    action: PointerAction = PointerAction.RELEASED
    """Kind of the last change."""
    by: str | None = None
    """Who made it (`user@host`)."""
    at: UtcTime | None = None
    """When, by the wall clock of that host."""
    why: str | None = None
    """Reason, as given by the user."""
    doomed: list[str] = Field(default_factory=list)
    """Releases that are being removed; they cannot become current any more."""


def released(
    before: CurrentPointer | None,
    manifest: ModelManifest,
    fence: Fence | None,
    *,
    against: str | None,
    by: str,
    at: datetime,
) -> CurrentPointer | PromotionResult:
    """A trainer's promotion; `against` is the release that the candidate was compared with, if any.

    Raises `Fenced` if the pointer was written under a larger fence.
    """
    _refuse_smaller_fence(before, fence)
    if before is not None and before.release_id != manifest.release_id:
        if before.pinned:
            return PromotionResult.PINNED
        if against is not None and against != before.release_id:
            return PromotionResult.OVERTAKEN
    _refuse_doomed(before, manifest)
    release_id, weights = manifest.release_id, manifest.weights_sha256
    return _changed(
        before, PointerAction.RELEASED, by=by, at=at, release_id=release_id, weights_sha256=weights, fence=fence
    )


def taken_over(before: CurrentPointer | None, fence: Fence | None, *, by: str, at: datetime) -> CurrentPointer | None:
    """A trainer's fence on the current release, if there is one. Raises `Fenced` as `released` does."""
    _refuse_smaller_fence(before, fence)
    return None if before is None else _changed(before, PointerAction.TAKEN_OVER, by=by, at=at, fence=fence)


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
    """A user's choice of a release; a rollback pins. Raises `PipelineError` if the pointer is not as `seen`."""
    _refuse_unseen(before, seen)
    _refuse_doomed(before, manifest)
    if before is not None and before.release_id == manifest.release_id:
        raise PipelineError(f"{manifest.release_id} is the current release already")
    action = PointerAction.ROLLED_BACK if rollback else PointerAction.PROMOTED
    release_id, weights = manifest.release_id, manifest.weights_sha256
    pinned = rollback or (before is not None and before.pinned)
    return _changed(before, action, by=by, at=at, why=why, release_id=release_id, weights_sha256=weights, pinned=pinned)


def pinned(before: CurrentPointer | None, on: bool, *, by: str, at: datetime, why: str | None) -> CurrentPointer | None:
    """A pin set or removed by a user; None if nothing changes."""
    if before is None:
        raise PipelineError("nothing has been released yet: there is nothing to pin")
    if before.pinned == on:
        return None
    action = PointerAction.PINNED if on else PointerAction.UNPINNED
    return _changed(before, action, by=by, at=at, why=why, pinned=on)


def pruned(
    before: CurrentPointer | None, releases: Sequence[ModelManifest], too_old: Sequence[str], *, by: str, at: datetime
) -> CurrentPointer | None:
    """The pointer that lists the releases that are `too_old` as doomed; None if there are none.

    Releases are removed only after the pointer lists them, so a user who promotes one of them concurrently either
    succeeds, and it is kept, or is refused.
    """
    if before is None:
        return None
    kept = {before.release_id, *(m.parent for m in releases if m.release_id == before.release_id)}
    there = {manifest.release_id for manifest in releases}
    doomed = in_order((set(too_old) | set(before.doomed)) & there - kept)
    if not doomed:
        return None
    return _changed(before, PointerAction.PRUNED, by=by, at=at, doomed=doomed)


def _refuse_smaller_fence(before: CurrentPointer | None, fence: Fence | None) -> None:
    if before is not None:
        refuse_smaller_fence(before.fence, fence, subject=f"release {before.release_id} was promoted by")


def _refuse_unseen(before: CurrentPointer | None, seen: CurrentPointer | None) -> None:
    """Raise `PipelineError` if the current release is not the one that the user saw."""
    now, then = (None if pointer is None else pointer.release_id for pointer in (before, seen))
    if now != then:
        raise PipelineError(f"the current release is {now} now, it was {then}: look again ('mimstream models list')")


def _refuse_doomed(before: CurrentPointer | None, manifest: ModelManifest) -> None:
    if before is not None and manifest.release_id in before.doomed:
        raise PipelineError(f"release {manifest.release_id} is being removed (MIM_MODELS__KEEP_RELEASES)")


def _changed(
    before: CurrentPointer | None,
    action: PointerAction,
    *,
    by: str,
    at: datetime,
    why: str | None = None,
    **fields: object,
) -> CurrentPointer:
    sequence = 0 if before is None else before.sequence + 1
    audit = {"sequence": sequence, "action": action, "by": by, "at": at, "why": why}
    return CurrentPointer.model_validate({**dict(before or ()), **audit, **fields})
