"""Releases and the pointer to the current one, looked at from outside."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

from schemas.errors import PipelineError
from streams.stores.artifacts.registry import folder_registry
from tests.faults.checks import Findings
from tests.faults.reference import Reference
from tests.faults.world import World


def look_at_releases(world: World, reference: Reference) -> Findings:
    """Each release is a point on the way of the uninterrupted trainer, each goes beyond its parent, one is current."""
    found = Findings()
    store = folder_registry(world.settings.models)
    try:
        manifests, pointer = store.list(), store.current()
        if pointer is not None:
            store.load(pointer.release_id)
    except PipelineError as error:
        return Findings([f"the current release cannot be loaded: {error}"])
    if pointer is None:
        return Findings(["no release is current"] if manifests else [])
    by_id = {manifest.release_id: manifest for manifest in manifests}
    chain = []
    at = by_id.get(pointer.release_id)
    while at is not None:
        chain.append(at)
        at = by_id.get(at.parent or "")
    for manifest in chain:
        known = reference.after.get(manifest.steps)
        if known is None or (manifest.rows_trained, manifest.rows_sha256) != tuple(known):
            found.add(f"release {manifest.release_id} was trained on other rows than an uninterrupted run")
    for newer, older in pairwise(chain):
        behind = [p for p, end in older.offsets["behaviours"].items() if newer.offsets["behaviours"].get(p, 0) < end]
        if newer.rows_trained <= older.rows_trained or behind:
            found.add(f"release {newer.release_id} does not go beyond its parent {older.release_id}")
    found.figures = {"releases": len(manifests)}
    return found


class PointerWatch:
    """Follows the pointer all the time, as a server would: at every moment it names a whole release, or nothing."""

    def __init__(self, world: World) -> None:
        self._store = folder_registry(world.settings.models)
        self._pointer = Path(world.settings.models.folder) / "current.json"
        self._last: str | None = None
        self.findings = Findings()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(0.002)

    def look(self) -> None:
        """One look; a release that was whole before is not loaded again."""
        try:
            text = self._pointer.read_text()
        except FileNotFoundError:
            if self._last is not None:
                self.findings.add("the pointer to the current release is gone")
            self._last = None
            return
        try:
            release_id = str(json.loads(text)["release_id"])
            if release_id != self._last:
                self._store.load(release_id)
            self._last = release_id
        except (ValueError, KeyError, PipelineError) as error:
            if self._pointer.exists() and self._pointer.read_text() == text:
                self.findings.add(f"the pointer named a release that was not there or not whole: {error}")
