"""The scripts in `tests/examples`, run as a user runs them, against the real processes."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streams.settings import Settings, environment_of
from streams.stores.vectors.collection import read_center
from tests.factories.index_worker import ONE_THREAD, Start
from tests.factories.releases import release_untrained

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(480)
async def test_every_example_runs_against_the_real_stack(
    settings: Settings, settings_values: dict[str, Any], process: Start
) -> None:
    index, record = process("index", env=ONE_THREAD), process("record")
    serve = process("serve", "--port", "0", env=ONE_THREAD)
    for child, ready in ((index, "index.ready"), (record, "record.ready"), (serve, "serve.ready")):
        await asyncio.to_thread(child.wait_for, ready, 180)
    port = re.search(r"http://127\.0\.0\.1:(\d+)", serve.output())
    assert port is not None
    environment = environment_of(settings_values) | {"MIM_SERVE__PORT": port[1]}
    run = []

    async def ran(name: str) -> str:
        run.append(name)
        return await asyncio.to_thread(run_example, name, environment)

    assert "'item_id': 'sku-1001'" in await ran("publish_and_find.py")

    center = await read_center(settings.milvus)
    assert center is not None and center.encoder_version is not None
    released = release_untrained(settings, encoder_version=center.encoder_version, dim=center.dim)
    await asyncio.to_thread(serve.wait_for, released)
    answer = await ran("click_and_score.py")
    assert f"'release_id': '{released}'" in answer and "'has_vector': True" in answer

    found = await ran("read_embeddings.py")
    assert found == f"{center.encoder_version} sku-1001 ({center.dim},) norm 1.0\n"
    assert sorted(run) == sorted(path.name for path in EXAMPLES.glob("*.py"))
