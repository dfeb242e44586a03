"""Which release a person means."""

from __future__ import annotations

from schemas.errors import PipelineError
from schemas.manifests import ModelManifest
from streams.stores.artifacts.registry import ModelStore


def find_release(store: ModelStore, named: str | None) -> ModelManifest:
    """The release of that name, or the one whose name begins so; the current one if none is named.

    Raises `PipelineError` if none or more than one is meant.
    """
    if named is None:
        current = store.current()
        if current is None:
            raise PipelineError("nothing has been released yet")
        return store.manifest(current.release_id)
    found = [manifest for manifest in store.list() if manifest.release_id.startswith(named)]
    if len(found) != 1:
        what = "no release" if not found else "more than one release"
        raise PipelineError(f"{what} that is kept is called {named!r}: see 'mimstream models list'")
    return found[0]
