"""The system under the scoring benchmark: an embedded stack, filled stores, a real `mimstream serve`, and the floor."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import aiohttp

from encoders.config import EncoderConfig
from schemas.errors import Unavailable
from streams.bench.score_world import DIM, World, draw_world, encoder_version
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.broker.topics import create_topics
from streams.runtime.child import Child
from streams.settings import Settings, child_arguments, child_environment, child_settings
from streams.stack.run import folders_of, running_stack
from streams.stores.artifacts.registry import folder_registry
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.vectors.milvus_index import MilvusItemIndex

_ROWS_AT_ONCE = 500
_PATIENCE_MS = 60_000
"""How long a score waits for its search: no encoding is left out of what is measured."""
_TAKEN_UP_SECONDS = 60


class ScoreSystem:
    """Both servers as processes of their own, over one drawn world. `routes` names where each is asked."""

    def __init__(self, settings: Settings, folder: Path, world: dict[str, int], config_file: Path | None) -> None:
        self._settings = settings
        self._folder = folder
        self._plan = world
        self._config_file = config_file
        self._open = ExitStack()
        self._values: dict[str, dict[str, Any]] = {}
        self.world: World = draw_world(**world)
        self.routes: dict[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            stack = opening.enter_context(running_stack(self._folder / "stack", self._settings.stack))
            values: dict[str, dict[str, Any]] = stack.endpoints | folders_of(self._folder)
            values["serve"] = {"port": 0, "host": "127.0.0.1", "tokens": [], "query_deadline_ms": _PATIENCE_MS}
            values["encoder"] = EncoderConfig().model_dump()
            self._values, settings = values, child_settings(self._settings, values)
            create_topics(settings.kafka, settings.topics)
            asyncio.run(self._fill(settings))
            environment = child_environment(self._settings, values)
            serving = self._serve(opening, environment, "serve")
            self.routes["system"] = f"{serving}/v1/score"
            plan = self._folder / "plan.json"
            answer = self._folder / "answer.json"
            answer.write_bytes(asyncio.run(self._first_answer(serving)))
            plan.write_text(json.dumps({"world": self._plan, "answer": str(answer)}))
            floor = self._start(opening, ["floor", str(plan)], environment, "floor", "streams.bench.score_floor")
            self.routes |= {"inline": f"{floor}/inline", "threads": f"{floor}/threads"}
            self._open = opening.pop_all()
        return self

    def teach(self) -> str:
        """Promote a release that reads searches, and start a server for it; returns where that is asked."""
        values = self._values | {"trainer": {"features": {"queries": True}}}
        release_id = self._promote(child_settings(self._settings, values), queries=True)
        serving = self._serve(self._open, child_environment(self._settings, values), "serve-searches")
        asyncio.run(self._taken_up(f"{serving}/v1/score", release_id))
        return f"{serving}/v1/score"

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _serve(self, opening: ExitStack, environment: dict[str, str], name: str) -> str:
        return self._start(opening, [*child_arguments(self._config_file), "serve"], environment, name, "streams")

    def _start(
        self, opening: ExitStack, arguments: Sequence[str], environment: dict[str, str], name: str, module: str
    ) -> str:
        """Start a server and wait until it answers; returns its address."""
        child = Child(arguments, self._folder / f"{name}.log", environment, module=module)
        opening.callback(child.stop)
        asyncio.run(child.ready())
        found = re.search(r'ready".*?(http://[0-9.:]+)|(http://[0-9.:]+).*?ready"', child.log_file.read_text())
        if found is None:
            raise Unavailable(f"`{module}`", f"it does not say where it answers\n{child.tail()}")
        return found[1] or found[2]

    async def _fill(self, settings: Settings) -> None:
        """Items into Milvus, takes into Valkey, the release into its folder; each through the product's own store."""
        index = MilvusItemIndex(settings.milvus, encoder_version=encoder_version(), dim=DIM)
        try:
            await index.open()
            rows = self.world.rows()
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                await index.upsert(rows[start : start + _ROWS_AT_ONCE])
        finally:
            await index.close()
        behaviours = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
        try:
            await behaviours.bind(TopicIncarnation("bench", "behaviours", "bench"))
            takes = [BehaviourRecord(offset, take) for offset, take in enumerate(self.world.behaviours())]
            for start in range(0, len(takes), _ROWS_AT_ONCE):
                part = takes[start : start + _ROWS_AT_ONCE]
                await behaviours.record(0, part, first_offset=0, next_offset=start + len(part))
        finally:
            await behaviours.close()
        self._promote(settings, queries=False)

    def _promote(self, settings: Settings, *, queries: bool) -> str:
        weights, manifest = self.world.release(self._plan["history"], queries=queries)
        models = folder_registry(settings.models)
        models.publish(weights, manifest)
        models.promote(manifest.release_id, None)
        return manifest.release_id

    async def _taken_up(self, url: str, release_id: str) -> None:
        async with asyncio.timeout(_TAKEN_UP_SECONDS), aiohttp.ClientSession() as session:
            while True:
                async with session.post(url, data=self.world.bodies()[0]) as response:
                    if (await response.json()).get("release_id") == release_id:
                        return
                await asyncio.sleep(0.2)

    async def _first_answer(self, address: str) -> bytes:
        """One real answer, whose size the floor's will have. Raises `Unavailable` unless it is what it should be."""
        async with aiohttp.ClientSession() as session:
            asked = self.world.bodies()[0]
            async with session.post(
                f"{address}/v1/score", data=asked, headers={"Content-Type": "application/json"}
            ) as response:
                body = await response.read()
        answer = json.loads(body)
        if (
            response.status != 200
            or answer["history_length"] != self._plan["history"]
            or not all(one["has_vector"] and one["probability"] is not None for one in answer["scores"])
        ):
            raise Unavailable("`mimstream serve`", f"it answers {response.status}: {body[:500]!r}")
        return body
