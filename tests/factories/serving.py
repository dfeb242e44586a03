"""The HTTP interface over stores in memory: a bench to ask it, shared by the tests of what it answers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from numpy.typing import NDArray
from torch import Tensor

from encoders.base import ItemContent, Prepared
from schemas.errors import EncodingFailed, Misconfigured, Reason, StoreUnavailable
from schemas.manifests import ModelManifest
from streams.broker.clients import BrokerConfig
from streams.broker.cluster import TopicIncarnation
from streams.broker.records import BehaviourRecord
from streams.broker.topics import TopicsConfig
from streams.monitoring.metrics import Metrics
from streams.serving.api import ScoringService, make_app
from streams.serving.config import ServeConfig, VectorCacheConfig
from streams.serving.connections import Connections
from streams.serving.forward_passes import ForwardPasses
from streams.serving.model_watcher import ModelWatcher
from streams.serving.query_vectors import QueryEncoder, QueryVectors
from streams.serving.score_query import ScoreQueries
from streams.serving.skew_log import SkewLog
from streams.serving.states_follower import StatesFollower
from streams.serving.vector_cache import VectorCache
from streams.stores.artifacts.registry import ModelRegistry, in_memory_registry
from streams.stores.histories.store import InMemoryBehaviourStore
from streams.stores.vectors.item_index import InMemoryItemIndex, ItemRow
from tests.factories import releases, vector_cache
from tests.factories.samples import behaviour
from trainer.features.config import FeatureConfig
from trainer.networks.item_rows import ItemRows, RequestMoment

VERSION = "words-1"
DIM = 256
FEATURES = FeatureConfig(max_items=1_000)
SEARCH_FEATURES = FEATURES.model_copy(update={"queries": True})
NOW = 1_800_000_000.5


class WordEncoder:
    """A unit vector per bag of words; refuses a picture that is not called one."""

    version = VERSION
    dim = DIM

    def prepare(self, content: ItemContent) -> Prepared:
        if content.image is not None and not content.image.startswith(b"picture"):
            raise EncodingFailed(Reason.BAD_IMAGE, "not a picture")
        text = content.title or (content.image or b"").decode()
        tokens = tuple(int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") for word in text.split())
        return Prepared(tokens=tokens, pixels=None)

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        rows = [sum(np.random.default_rng(t).normal(size=DIM) for t in p.tokens or ()) for p in batch]
        stacked = np.asarray(rows)
        return np.asarray(stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.float32)

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        return self.encode(batch)


class Loaded:
    async def get(self) -> WordEncoder:
        return WordEncoder()


Asked = tuple[ItemRows, int, RequestMoment | None]


class PlainScorer:
    """Sigmoid of (bias + cosine to the newest take); NaN for an item called so."""

    history_length = 3
    reads_queries = False
    kinds: tuple[str, ...] = ()

    def __init__(self, bias: float) -> None:
        self.bias = bias
        self.asked: list[Asked] = []
        """What was scored, by request."""

    def prepare(self, items: ItemRows, candidates: int, moment: RequestMoment | None = None) -> Asked:
        self.asked.append((items, candidates, moment))
        return self.asked[-1]

    def probabilities(self, batch: Asked) -> NDArray[np.float64]:
        items, candidates, _ = batch
        vectors, past = items.by_item(), items.item_ids[candidates:]
        last = vectors.get(past[-1]) if past else None
        logits = [
            np.nan
            if item == "nan"
            else self.bias + float(vectors[item] @ last)
            if item in vectors and last is not None
            else self.bias
            for item in items.item_ids[:candidates]
        ]
        return 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)[:, None]))

    def features_of(self, batch: Asked) -> NDArray[np.float32]:
        return np.zeros((batch[1], len(FEATURES.names)), np.float32)


def make_scorer(weights: Mapping[str, Tensor], manifest: ModelManifest) -> PlainScorer:
    if "bias" not in weights:
        raise Misconfigured(f"release {manifest.release_id} has no bias")
    return PlainScorer(float(weights["bias"]))


def release(
    store: ModelRegistry, number: int, bias: float, *, version: str = VERSION, name: str = "bias", **made: Any
) -> str:
    weights, made = {name: torch.tensor(bias)}, made | {"encoder_version": version, "dim": DIM}
    return releases.release(store, number, weights=weights, rows_trained=number * 100, **made)


def row(item_id: str, title: str) -> ItemRow:
    encoder = WordEncoder()
    vector = encoder.encode([encoder.prepare(ItemContent(title=title))])[0]
    content = {"vector": vector, "title": title, "category": "shoes", "price": 9.5, "first_price": 10.0}
    return vector_cache.row(item_id, 7, version=VERSION, source_partition=2, **content)


class Down(InMemoryBehaviourStore):
    async def ping(self) -> None:
        raise StoreUnavailable("Redis", "nothing answers at redis://10.1.2.3 (MIM_REDIS__URL)")

    async def takes(self, user_id: str) -> tuple[list[str], list[int]]:
        await self.ping()
        return [], []


@dataclass
class Bench:
    client: TestClient[Any, Any]
    service: ScoringService
    index: InMemoryItemIndex
    models: ModelRegistry
    features: FeatureConfig = FEATURES

    async def serve(self, number: int, bias: float) -> str:
        """Promote a release and take it up."""
        released = release(self.models, number, bias, features=self.features.version)
        await self.service.models.refresh()
        return released

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        response = await self.client.post(path, json=body)
        return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        response = await self.client.get(path)
        return response.status, await response.json()


Open = Callable[..., Any]


@pytest.fixture
async def open_bench() -> AsyncIterator[Open]:
    clients: list[TestClient[Any, Any]] = []
    pool = ThreadPoolExecutor(2)

    async def start(
        *,
        behaviours: InMemoryBehaviourStore | None = None,
        index: InMemoryItemIndex | None = None,
        encoder: QueryEncoder | None = None,
        features: FeatureConfig = FEATURES,
        **config: Any,
    ) -> Bench:
        index = index or InMemoryItemIndex(encoder_version=VERSION, dim=DIM)
        await index.upsert([row("boot", "red winter boot"), row("shoe", "red summer shoe"), row("lamp", "desk lamp")])
        if behaviours is None:
            behaviours = InMemoryBehaviourStore()
            await behaviours.bind(TopicIncarnation("c", "t", "i"))
            taken = BehaviourRecord(0, behaviour("e", "click", user="ann", item="boot"))
            await behaviours.record(0, [taken], first_offset=0, next_offset=1)
        metrics = Metrics("serve")
        models = in_memory_registry()
        clock = asyncio.get_running_loop().time
        served = ServeConfig(**config)
        queries = QueryVectors(
            encoder or Loaded(),
            pool,
            most_cached=served.query_cache,
            most_waiting=served.max_waiting_queries,
            on_report=metrics.record,
        )
        service = ScoringService(
            config=served,
            vector_cache=VectorCache(
                index, VectorCacheConfig(), encoder_version=VERSION, dim=DIM, facts=features, clock=clock
            ),
            states=StatesFollower(features, BrokerConfig(), TopicsConfig(), clock=clock),
            skew=SkewLog(
                features.version, share=1.0, broker=BrokerConfig(), topics=TopicsConfig(), seed=0, clock=clock
            ),
            index=index,
            behaviours=behaviours,
            models=ModelWatcher(
                models,
                make_scorer,
                encoder_version=VERSION,
                features=features.version,
                poll_seconds=0.02,
                on_report=metrics.record,
            ),
            queries=ScoreQueries(queries, served.query_deadline_ms / 1_000),
            encoder_version=VERSION,
            passes=ForwardPasses(pool),
            on_report=metrics.record,
            metrics_page=metrics.page,
            now=lambda: NOW,
        )
        connections = Connections(service.config.max_connections, service.config.head_seconds, metrics.record)
        server = TestServer(make_app(service, connections))
        await server.start_server(auto_decompress=False)
        client: TestClient[Any, Any] = TestClient(server)
        clients.append(client)
        return Bench(client, service, index, models, features)

    yield start
    for client in clients:
        await client.close()
    pool.shutdown()
