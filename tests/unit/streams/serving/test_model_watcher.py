"""Which release answers: while newer ones come, cannot be used, or the store or its pointer is not what it was."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog

from schemas.errors import BrokerUnavailable, StoreUnavailable
from streams.broker.clients import BrokerConfig
from streams.serving import model_watcher
from streams.serving.model_watcher import ModelWatcher
from streams.serving.reports import ModelReport
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import folder_registry, in_memory_registry
from tests.factories.serving import VERSION, make_scorer, release
from trainer.features.config import FeatureConfig


@pytest.mark.parametrize("name", ["latest", "", "r000001", "../r000001-0123456789ab", "rabcdef-0123456789ab"])
async def test_a_pointer_to_no_release_is_reported_once_and_the_release_before_goes_on(
    tmp_path: Path, name: str
) -> None:
    store, reports = folder_registry(ModelStoreConfig(folder=tmp_path)), list[ModelReport]()
    watcher = ModelWatcher(
        store,
        make_scorer,
        encoder_version=VERSION,
        features=FeatureConfig().version,
        poll_seconds=1.0,
        on_report=reports.append,
        monotonic=lambda: 0.0,
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


class Scene:
    """A watcher over a store in memory, and everything that can be wrong with a release."""

    def __init__(self) -> None:
        self.store, self.reports, self.now = in_memory_registry(), list[ModelReport](), 0.0
        self.scorers = 0
        self.watcher = ModelWatcher(
            self.store,
            self.make,
            encoder_version=VERSION,
            features=FeatureConfig().version,
            poll_seconds=60.0,
            on_report=self.reports.append,
            monotonic=lambda: self.now,
        )

    def make(self, weights: Any, manifest: Any) -> Any:
        self.scorers += 1
        self.now += 0.25
        bias = float(weights["bias"]) if "bias" in weights else None
        if bias is None:
            raise RuntimeError("no bias")
        answers = {-1.0: np.array([[np.nan]]), -2.0: np.array([[0.5, 0.5]])}
        plain = make_scorer(weights, manifest)
        if bias not in answers:
            return plain
        return SimpleNamespace(kinds=(), prepare=lambda *_: None, probabilities=lambda _: answers[bias])

    @property
    def serving(self) -> str | None:
        current = self.watcher.current
        return None if current is None else current.manifest.release_id


async def test_a_newer_release_is_taken_up_once_and_reported_with_its_figures() -> None:
    scene = Scene()
    await scene.watcher.refresh()
    assert (scene.serving, scene.watcher.problem, scene.reports) == (None, None, [])
    for number in (1, 2):
        name = release(scene.store, number, 0.5 * number)
        await scene.watcher.refresh()
        await scene.watcher.refresh()
        assert scene.serving == name and scene.scorers == number
    assert scene.reports == [ModelReport("loaded", 1, 100, 0.25), ModelReport("loaded", 2, 200, 0.25)]


@pytest.mark.parametrize(
    ("made", "outcome", "told"),
    [
        ({"bias": -1.0}, "damaged", "answers array"),
        ({"bias": -2.0}, "damaged", "answers array"),
        ({"bias": 1.0, "name": "other"}, "damaged", "cannot be built.*no bias"),
        ({"bias": 1.0, "version": "another"}, "wrong_encoder", f"encoder another, the center holds {VERSION}"),
        ({"bias": 1.0, "features": "another"}, "wrong_features", "reads features another.*MIM_TRAINER__FEATURES__"),
        ({"bias": 1.0, "features": None}, "wrong_features", "features of an earlier build.*train again"),
    ],
    ids=["not finite", "not one score", "cannot be built", "another encoder", "other features", "no features"],
)
async def test_a_release_that_cannot_serve_is_tried_again_now_and_then_and_told_once(
    made: dict[str, Any], outcome: str, told: str
) -> None:
    scene = Scene()
    good = release(scene.store, 1, 0.5)
    await scene.watcher.refresh()
    release(scene.store, 2, **made)
    for _ in range(9):
        await scene.watcher.refresh()
        scene.now += 10
    assert scene.serving == good and re.search(told, scene.watcher.problem or "")
    assert [report.outcome for report in scene.reports] == ["loaded", outcome] and scene.reports[1].number == 2
    if outcome == "damaged":  # of others no scorer is even made
        assert scene.scorers == 1 + 3  # at once, and after 30 s each
    third = release(scene.store, 3, 0.25)
    await scene.watcher.refresh()
    assert (scene.serving, scene.watcher.problem) == (third, None)


async def test_each_release_that_cannot_serve_is_told() -> None:
    scene = Scene()
    for number, bias in enumerate((0.5, -1.0, -2.0), start=1):
        release(scene.store, number, bias)
        await scene.watcher.refresh()
    assert [(report.outcome, report.number) for report in scene.reports] == [
        ("loaded", 1),
        ("damaged", 2),
        ("damaged", 3),
    ]


async def test_going_back_to_the_release_that_serves_ends_the_complaint() -> None:
    scene = Scene()
    good = release(scene.store, 1, 0.5)
    await scene.watcher.refresh()
    bad = release(scene.store, 2, -1.0)
    await scene.watcher.refresh()
    scene.store.promote(good, None)
    await scene.watcher.refresh()
    assert scene.watcher.problem is None
    scene.store.promote(bad, None)
    await scene.watcher.refresh()
    assert scene.scorers == 3 and scene.watcher.problem is not None  # tried anew at once


async def test_a_store_that_is_away_is_told_and_the_model_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    good = release(scene.store, 1, 0.5)
    await scene.watcher.refresh()

    def away() -> Any:
        raise StoreUnavailable("model store", "away")

    with monkeypatch.context() as patch:
        patch.setattr(scene.store, "current", away)
        with structlog.testing.capture_logs() as logged:
            await scene.watcher.refresh()
            await scene.watcher.refresh()
    assert [line["event"] for line in logged] == ["serve.model_unavailable"]
    assert scene.serving == good and "away" in (scene.watcher.problem or "") and len(scene.reports) == 1
    await scene.watcher.refresh()
    assert scene.watcher.problem is None


async def test_a_store_that_goes_away_while_a_release_is_read_is_asked_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene()
    good = release(scene.store, 1, 0.5)
    await scene.watcher.refresh()
    newer = release(scene.store, 2, 0.25)

    def away(release_id: str) -> Any:
        raise StoreUnavailable("model store", "away")

    with monkeypatch.context() as patch:
        patch.setattr(scene.store, "load", away)
        await scene.watcher.refresh()
    assert scene.serving == good and "away" in (scene.watcher.problem or "") and len(scene.reports) == 1
    await scene.watcher.refresh()
    assert scene.serving == newer and scene.watcher.problem is None


async def test_a_wake_refreshes_at_once_and_a_notice_wakes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, stop = Scene(), asyncio.Event()
    notices: list[Any] = [{}, {"partition": ["record"]}]
    connected: list[str] = []

    class Consumer:
        async def start(self) -> None:
            connected.append("begun")
            if len(notices) == 2:
                notices.append("away once")
                raise BrokerUnavailable("Kafka", "away")

        async def stop(self) -> None:
            connected.append("ended")

        async def getmany(self, *, timeout_ms: int) -> Any:
            await asyncio.sleep(0)
            return notices.pop(0) if notices and isinstance(notices[0], dict) else {}

    async def served(number: int) -> None:
        async with asyncio.timeout(10):
            while not (scene.serving or "").startswith(f"r{number:06d}"):
                await asyncio.sleep(0)

    monkeypatch.setattr(model_watcher, "make_consumer", lambda *_, **more: Consumer())
    monkeypatch.setattr(model_watcher, "POINTER_FOLLOWS_SECONDS", 0.02)
    release(scene.store, 1, 0.5)
    running = asyncio.create_task(scene.watcher.run(stop))
    await served(1)
    woken: list[float] = []
    wake = scene.watcher.wake

    def counted() -> None:
        woken.append(asyncio.get_running_loop().time())
        wake()

    monkeypatch.setattr(scene.watcher, "wake", counted)
    release(scene.store, 2, 0.25)
    following = asyncio.create_task(
        model_watcher.follow_notices(scene.watcher, BrokerConfig(), "models", stop, retry_seconds=0.0)
    )
    await served(2)
    async with asyncio.timeout(10):
        while len(woken) < 2:
            await asyncio.sleep(0.005)
    assert woken[1] - woken[0] >= 0.02
    stop.set()
    wake()
    await asyncio.gather(running, following)
    assert connected == ["begun", "ended"] * 2
