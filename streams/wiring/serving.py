"""Wiring of `mimstream serve`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from encoders.base import Encoder
from schemas.errors import Misconfigured
from schemas.manifests import ModelManifest
from streams.indexing.addresses import is_loopback
from streams.monitoring.metrics import Metrics
from streams.runtime.process import run_until_stopped
from streams.serving.api import ScoringService, make_app
from streams.serving.config import ServeConfig
from streams.serving.connections import Connections, affordable_connections, listening
from streams.serving.embeddings_follower import EmbeddingsFollower
from streams.serving.forward_passes import ForwardPasses
from streams.serving.model_watcher import ModelWatcher, follow_notices
from streams.serving.query_vectors import QueryVectors
from streams.serving.score_query import ScoreQueries
from streams.serving.skew_log import SkewLog
from streams.serving.states_follower import StatesFollower
from streams.serving.vector_cache import VectorCache
from streams.settings import Settings
from streams.stores.artifacts.registry import open_registry
from streams.stores.histories.client import make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.vectors.collection import read_center
from streams.stores.vectors.milvus_index import MilvusItemIndex

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.networks.scorer import Scorer


log = structlog.get_logger()

DRAIN_SECONDS = 5.0
KAFKA_PATIENCE_SECONDS = 5.0
"""How long the start waits for Kafka, where nothing refuses the connection."""
OTHER_FILES = 256
"""Open files besides HTTP's and Redis's: Kafka, Milvus, the model folder, libraries."""


class LazyEncoder:
    """The encoder of queries, loaded in a thread at the first use; must be the one that made the center's vectors."""

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self._load = load
        self._loading: asyncio.Future[Encoder] | None = None
        self.expected_version: str | None = None

    async def get(self) -> Encoder:
        """The encoder. Raises `Misconfigured` if it cannot be loaded or is not the center's."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        encoder = await asyncio.shield(self._loading)
        if self.expected_version not in (None, encoder.version):
            raise Misconfigured(
                f"the center holds vectors of encoder {self.expected_version!r}, MIM_ENCODER__BUNDLE is "
                f"{encoder.version!r}: a query encoded by one cannot be compared with items encoded by the other; set "
                "MIM_ENCODER__BUNDLE to the bundle of the former"
            )
        return encoder


def _load_encoder(settings: Settings) -> Encoder:
    import torch

    from encoders.loading import load_encoder  # torch and the towers: takes seconds, for queries by content only

    torch.set_num_threads(1)  # as in `make_scorer`, unless the encoder's own settings say otherwise
    return load_encoder(settings.encoder)


def make_scorer(weights: Mapping[str, Tensor], manifest: ModelManifest) -> Scorer:
    """Build the model of a release, computing on one thread. Imports torch."""
    import torch

    from trainer.networks.scorer import Scorer

    torch.set_num_threads(1)  # requests run side by side; threads inside one would only contend
    return Scorer.from_release(weights, manifest)


async def serve(settings: Settings, config: ServeConfig) -> None:
    """Open the stores, follow `embeddings`, `item-states` and `models`, and answer requests until stopped.

    Kafka may be away meanwhile: `/readyz` says what cannot be confirmed then.

    Raises `Misconfigured` if the address cannot be used, the topic is missing or the encoder is not the center's.
    """
    metrics = Metrics("serve")
    async with AsyncExitStack() as opened:
        redis = make_redis(settings.redis)
        behaviours = RedisBehaviourStore(redis, settings.redis, settings.behaviours)
        opened.push_async_callback(behaviours.close)
        await behaviours.ping()
        encoder = LazyEncoder(lambda: _load_encoder(settings))
        version, dim = await _vectors_in_use(settings, encoder)
        encoder.expected_version = version
        if config.load_encoder_at_start:
            await encoder.get()
        index = MilvusItemIndex(settings.milvus, encoder_version=version, dim=dim)
        opened.push_async_callback(index.close)
        await index.open()
        features = settings.trainer.features
        vector_cache = VectorCache(
            index, config.cache, encoder_version=version, dim=dim, facts=features, clock=time.monotonic
        )
        skew = SkewLog(
            features.version,
            share=config.skew_share,
            broker=settings.kafka,
            topics=settings.topics,
            seed=time.time_ns(),
            clock=time.monotonic,
        )
        states = StatesFollower(features, settings.kafka, settings.topics, clock=time.monotonic)
        models = ModelWatcher(
            open_registry(settings.models),
            make_scorer,
            encoder_version=version,
            features=features.version,
            poll_seconds=config.poll_models_seconds,
            on_report=metrics.record,
        )
        compute = ThreadPoolExecutor(config.compute_threads, thread_name_prefix="compute")
        opened.callback(compute.shutdown, wait=False, cancel_futures=True)
        passes = ThreadPoolExecutor(config.score_threads, thread_name_prefix="score")
        opened.callback(passes.shutdown, wait=False, cancel_futures=True)
        connections = Connections(
            affordable_connections(config.max_connections, settings.redis.max_connections + OTHER_FILES),
            config.head_seconds,
            metrics.record,
        )
        queries = QueryVectors(
            encoder,
            compute,
            most_cached=config.query_cache,
            most_waiting=config.max_waiting_queries,
            on_report=metrics.record,
        )
        app = make_app(
            ScoringService(
                config=config,
                vector_cache=vector_cache,
                states=states,
                skew=skew,
                index=index,
                behaviours=behaviours,
                models=models,
                queries=ScoreQueries(queries, config.query_deadline_ms / 1_000),
                encoder_version=version,
                passes=ForwardPasses(passes),
                on_report=metrics.record,
                metrics_page=metrics.page,
                now=time.time,
            ),
            connections,
        )
        follower = EmbeddingsFollower(
            vector_cache,
            settings.kafka,
            settings.topics,
            warm_up=config.cache.warm_up,
            clock=time.monotonic,
        )

        async def work(stop: asyncio.Event) -> None:
            tried, states_tried = asyncio.Event(), asyncio.Event()
            await models.refresh()  # a present release serves from the first request on
            async with AsyncExitStack() as running:
                tasks = [
                    asyncio.ensure_future(follower.run(stop, tried.set)),
                    asyncio.ensure_future(states.run(stop, states_tried.set)),
                    asyncio.ensure_future(skew.run(stop)),
                    asyncio.ensure_future(models.run(stop)),
                    asyncio.ensure_future(
                        follow_notices(models, settings.kafka, settings.topics.full_name("models"), stop)
                    ),
                ]
                running.push_async_callback(_end, tasks)
                with suppress(TimeoutError):  # Kafka, which scores do not need, may be away
                    await _unless_ended(
                        tasks,
                        asyncio.wait_for(asyncio.gather(tried.wait(), states_tried.wait()), KAFKA_PATIENCE_SECONDS),
                    )
                await _listen(running, app, connections, config)
                await _unless_ended(tasks, stop.wait())

        await run_until_stopped(work, grace_seconds=DRAIN_SECONDS + 5.0)


async def _vectors_in_use(settings: Settings, encoder: LazyEncoder) -> tuple[str, int]:
    """Version and width of the center's vectors; of the configured encoder's, if nothing is indexed yet."""
    center = await read_center(settings.milvus)
    if center is not None and center.encoder_version is not None:
        return center.encoder_version, center.dim
    loaded = await encoder.get()
    return loaded.version, loaded.dim


async def _listen(running: AsyncExitStack, app: web.Application, connections: Connections, config: ServeConfig) -> None:
    try:
        host, port = await running.enter_async_context(
            listening(app, connections, host=config.host, port=config.port, drain_seconds=DRAIN_SECONDS)
        )
    except OSError as error:
        raise Misconfigured(
            f"cannot listen on {config.host}:{config.port} (MIM_SERVE__HOST, MIM_SERVE__PORT): {error.strerror}"
        ) from None
    if not config.tokens and not is_loopback(host):
        log.warning("serve.open_to_all", address=f"{host}:{port}", advice="set MIM_SERVE__TOKENS")
    log.info("serve.ready", address=f"http://{host}:{port}")


async def _unless_ended(tasks: Sequence[asyncio.Future[Any]], waited: Coroutine[Any, Any, Any]) -> None:
    """Wait for `waited`; if a background task ends first, raise its error."""
    waiting = asyncio.ensure_future(waited)
    try:
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done() and not waiting.done():
                task.result()
    finally:
        waiting.cancel()


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
