"""The pointer of an artifact store: optimistic updates, and whose fence may replace what another one wrote."""

from __future__ import annotations

from collections.abc import Callable

from schemas.errors import Fenced, StoreUnavailable
from schemas.manifests import Fence
from streams.stores.artifacts.artifact_store import ArtifactStore

_MAX_ATTEMPTS = 100


def update_pointer(store: ArtifactStore, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
    """Replace the pointer's text by what `change` makes of it; None leaves it alone. Returns what `change` made.

    `change` is called again with the new text if another writer was faster, so whatever it refuses (a smaller fence, a
    pin) is refused against the pointer that is really replaced. What it raises passes through, and nothing is written.
    The text must differ at every change (include a running number): equal texts count as the same state.
    """
    for _ in range(_MAX_ATTEMPTS):
        before = store.pointer()
        after = change(None if before is None else before.content)
        if after is None or store.compare_and_swap(after, expected=before):
            return after
        now = store.pointer()
        if now is not None and now.content == after:
            return after  # ours: the reply to an earlier attempt was lost
    raise StoreUnavailable("store", f"the pointer was replaced {_MAX_ATTEMPTS} times while it was to be changed")


def may_replace(written_under: Fence | None, fence: Fence | None) -> bool:
    """Whether the holder of `fence` may replace what was written under another one: the same trainer or a later one."""
    return written_under is None or (fence is not None and fence.order >= written_under.order)


def last_term(fence: Fence | None, sequence: int) -> int:
    """A number that no term claimed so far is above, from a pointer's `fence` and its `sequence` of changes.

    A version without terms writes fences that lack one; the sequence goes on all the same.
    """
    return max(sequence, 0 if fence is None else fence.term)


def refuse_smaller_fence(written_under: Fence | None, fence: Fence | None, *, subject: str) -> None:
    """Raise `Fenced` unless `may_replace`; the message begins with `subject` ("release X was promoted by")."""
    if written_under is not None and not may_replace(written_under, fence):
        ours = "none" if fence is None else _named(fence)
        raise Fenced(
            f"{subject} a later trainer ({_named(written_under)}; ours: {ours}). If no other trainer runs, start "
            "`mimstream train` again: it claims the next term"
        )


def _named(fence: Fence) -> str:
    return f"term {fence.term}, producer {fence.producer_id}, epoch {fence.epoch}"
