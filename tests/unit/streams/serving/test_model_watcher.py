"""What answers while the pointer to the current release is not what anybody would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from streams.serving.model_watcher import ModelWatcher
from streams.serving.reports import ModelReport
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import folder_registry
from tests.factories.serving import VERSION, make_scorer, release


@pytest.mark.parametrize("name", ["latest", "", "r000001", "../r000001-0123456789ab", "rabcdef-0123456789ab"])
async def test_a_pointer_to_no_release_is_reported_once_and_the_release_before_goes_on(
    tmp_path: Path, name: str
) -> None:
    store, reports = folder_registry(ModelStoreConfig(folder=tmp_path)), list[ModelReport]()
    watcher = ModelWatcher(
        store, make_scorer, encoder_version=VERSION, poll_seconds=1.0, on_report=reports.append, monotonic=lambda: 0.0
    )
    pointer = tmp_path / "current.json"
    good = release(store, 1, 0.5)  # type: ignore[arg-type]
    was = pointer.read_text()
    await watcher.refresh()
    pointer.write_text(json.dumps(json.loads(was) | {"release_id": name}))
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await watcher.refresh()
    assert [line["event"] for line in logged] == ["serve.model_refused"]
    assert watcher.current is not None and watcher.current.manifest.release_id == good
    assert watcher.problem is not None and str(pointer.parent) in watcher.problem and "restore it" in watcher.problem
    assert [report.outcome for report in reports] == ["loaded", "damaged"]
    pointer.write_text(was)
    await watcher.refresh()
    assert watcher.problem is None
