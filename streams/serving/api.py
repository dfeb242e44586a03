"""The HTTP interface: scores, neighbours, items, health.

    POST /v1/score          probabilities for a user's candidates
    POST /v1/similar        nearest items of an item, a batch of items, a text or a picture
    GET  /v1/items/{id}     the item's row in the center (`?vector=1` with its vector)
    GET  /healthz           the process is alive
    GET  /readyz            whether it can score; if not, why
    GET  /metrics           Prometheus

With `MIM_SERVE__TOKENS` all but the two health checks need `Authorization: Bearer TOKEN`.

Errors are `{"error": {"code", "message"}}`. Scores use cached vectors (`serving/vector_cache.py` says how old these may
be); neighbours and items are read from the center itself. Queries are encoded in threads, off the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import orjson
import structlog
from aiohttp import web
from numpy.typing import NDArray
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from schemas.base import MAX_ID_CHARACTERS, Message, is_identifier
from schemas.errors import Misconfigured, PipelineError
from schemas.scoring import ItemView, Neighbour, ScoreRequest, SimilarRequest, SimilarResponse, SimilarResult
from streams.serving.config import KindName, ServeConfig
from streams.serving.connections import Connections
from streams.serving.edge import ApiError, edge, read_body, refuse_parameters
from streams.serving.forward_passes import ForwardPasses
from streams.serving.model_watcher import ModelWatcher
from streams.serving.score_query import ScoreQueries
from streams.serving.skew_log import SkewLog
from streams.serving.states_follower import StatesFollower
from streams.serving.vector_cache import VectorCache
from streams.stores.histories.store import BehaviourStore
from streams.stores.vectors.item_index import ItemIndex
from trainer.networks.item_rows import ItemRows, RequestMoment

log = structlog.get_logger()


@dataclass(frozen=True)
class ScoringService:
    """The collaborators of all requests."""

    config: ServeConfig
    vector_cache: VectorCache
    states: StatesFollower
    skew: SkewLog
    index: ItemIndex
    behaviours: BehaviourStore
    models: ModelWatcher
    queries: ScoreQueries
    encoder_version: str
    passes: ForwardPasses
    on_report: Callable[[object], None]
    """Receives every `RequestReport` and `CacheReport`."""
    metrics_page: Callable[[], bytes]
    """Renders `GET /metrics`, in the text format of Prometheus."""
    now: Callable[[], float]
    """Wall clock, seconds since 1970: the moment of requests that name none."""


SERVICE = web.AppKey("service", ScoringService)


def make_app(service: ScoringService, connections: Connections) -> web.Application:
    """Assemble the routes. The caller opens and closes the collaborators."""
    config = service.config
    app = web.Application(
        client_max_size=config.max_body_bytes, middlewares=edge(config, connections, service.on_report)
    )
    app[SERVICE] = service
    app.router.add_post("/v1/score", score)
    app.router.add_post("/v1/similar", similar)
    app.router.add_get("/v1/items/{item_id}", show_item)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


async def score(request: web.Request) -> web.Response:
    """`POST /v1/score`."""
    service = request.app[SERVICE]
    asked = await read_body(request, ScoreRequest, service.config)
    model = service.models.current  # one model for the whole request, whatever is swapped meanwhile
    if model is None:
        reason = service.models.problem or "no model has been released yet"
        log.debug("serve.no_model", reason=reason)
        raise ApiError(503, "no_model", "no model has been released yet; /v1/similar works without one")
    pending = service.queries.begin(asked, reads_queries=model.scorer.reads_queries)
    taken, taken_at = await service.behaviours.takes(asked.user_id)
    left_out = set(taken) if asked.exclude_taken else frozenset()
    candidates = [item_id for item_id in asked.item_ids if item_id not in left_out]
    deleted = service.vector_cache.deleted
    kept = [place for place, item_id in enumerate(taken) if item_id not in deleted][-model.scorer.history_length :]
    history, seconds = [taken[place] for place in kept], [taken_at[place] for place in kept]
    now = int(service.now() if asked.at is None else asked.at.timestamp())
    seen_last = [asked.trigger_item] if asked.trigger_item and asked.trigger_item not in deleted else []
    lookup = await service.vector_cache.look_up([*candidates, *history, *seen_last])
    service.on_report(lookup.report)
    query = await pending.had()
    items, facts = query.behind(lookup.items, lookup.facts)
    service.on_report(service.states.report())
    copies = service.states.copies
    states = copies.states(items.hashes_U2, facts)
    head = copies.held_head if service.skew.chooses(copies.held_head) else None
    past_at = [*seconds, *(now for _ in seen_last)]
    moment = RequestMoment(states, past_at, now, has_query=query.vector is not None, query_text=query.text)
    kinds = model.scorer.kinds
    if candidates:
        scorer = model.scorer
        batch, probabilities = await service.passes.run(
            lambda: scorer.prepare(items, len(candidates), moment), scorer.probabilities
        )
        held_U = lookup.items.has_vector_U[1:]
        # what is not held here may be known to the trainer a moment later
        if head is not None and held_U[len(candidates) :].all():
            past = lookup.items.item_ids[len(candidates) :][-scorer.history_length :]  # without the search
            scored = (model.manifest.release_id, head, now, candidates, past, past_at[-scorer.history_length :])
            values_BF = scorer.features_of(batch)
            service.skew.put(
                *scored, values_BF, probabilities[:, 0], held_B=held_U[: len(candidates)], query=query.used
            )
    else:
        probabilities = np.empty((0, 1 + len(kinds)))
    if deleted:
        probabilities[[number for number, item_id in enumerate(candidates) if item_id in deleted]] = np.nan
    return _answer(
        orjson.dumps(  # built by hand, since its validation would cost a fifth of a request; a NaN becomes null
            {
                "scores": _scores(probabilities, lookup.items, kinds, service.config.kind_weights),
                "left_out": [item_id for item_id in asked.item_ids if item_id in left_out],
                "release_id": model.manifest.release_id,
                "weights_sha256": model.manifest.weights_sha256,
                "encoder_version": model.manifest.encoder_version,
                "history_length": len(history),
                "query": query.use,
                **_missing(kinds, service.config.kind_weights),
            }
        )
    )


def _scores(
    probabilities: NDArray[np.float64], items: ItemRows, kinds: Sequence[str], weights: Mapping[KindName, float]
) -> list[dict[str, object]]:
    has_vector = items.has_vector_U[1 : len(probabilities) + 1].tolist()
    rows = zip(items.item_ids, probabilities[:, 0].tolist(), has_vector, strict=False)  # the history follows
    scores: list[dict[str, object]] = [
        {"item_id": item_id, "probability": probability, "has_vector": has_vector}
        for item_id, probability, has_vector in rows
    ]
    if kinds:
        for one, further in zip(scores, probabilities[:, 1:].tolist(), strict=True):
            one["kinds"] = dict(zip(kinds, further, strict=True))
    if weights:
        by_kind = {str(kind): weight for kind, weight in weights.items()}
        combined = probabilities @ np.array([by_kind.get(kind, 0.0) for kind in ("click", *kinds)])
        for one, score in zip(scores, combined.tolist(), strict=True):
            one["score"] = score
    return scores


def _missing(kinds: Sequence[str], weights: Mapping[KindName, float]) -> dict[str, list[str]]:
    """The kinds that are weighed and that no release output tells apart, if any."""
    missing: list[str] = [kind for kind in weights if kind not in ("click", *kinds)]
    return {"kinds_missing": missing} if missing else {}


async def similar(request: web.Request) -> web.Response:
    """`POST /v1/similar`."""
    service = request.app[SERVICE]
    asked = await read_body(request, SimilarRequest, service.config)
    item_ids = asked.item_ids or ([asked.item_id] if asked.item_id is not None else None)
    if item_ids is not None:
        results = await _near_items(service, item_ids, asked)
        if asked.item_id is not None and not results[0].found:
            raise ApiError(404, "item_not_found", f"the center does not hold item {asked.item_id!r}")
    else:
        found = await service.index.search(await _encoded_query(service, asked), asked.k)
        results = [SimilarResult(query=None, found=True, neighbours=_neighbours(found[0]))]
    return _json(SimilarResponse(results=results, encoder_version=service.encoder_version))


async def _near_items(service: ScoringService, item_ids: list[str], asked: SimilarRequest) -> list[SimilarResult]:
    rows = await service.index.fetch(list(dict.fromkeys(item_ids)), fresh=False)
    held = {item_id: row.vector for item_id, row in rows.items() if row.encoder_version == service.encoder_version}
    near: dict[str, list[tuple[str, float]]] = {}
    if held:
        lists = await service.index.search(np.stack(list(held.values())), asked.k + (not asked.include_self))
        near = dict(zip(held, lists, strict=True))
    return [
        SimilarResult(
            query=item_id,
            found=item_id in held,
            neighbours=_neighbours(
                [pair for pair in near.get(item_id, []) if asked.include_self or pair[0] != item_id][: asked.k]
            ),
        )
        for item_id in item_ids
    ]


async def _encoded_query(service: ScoringService, asked: SimilarRequest) -> NDArray[np.float32]:
    try:
        return (await service.queries.vectors.get(asked.text, asked.image))[None]
    except Misconfigured as error:
        log.error("serve.no_query_encoder", error=str(error))
        raise ApiError(
            503, "no_query_encoder", "this server cannot encode queries; ask for the neighbours of an item"
        ) from None


def _neighbours(pairs: list[tuple[str, float]]) -> list[Neighbour]:
    return [Neighbour(item_id=item_id, similarity=max(-1.0, min(1.0, cosine))) for item_id, cosine in pairs]


_FLAGS = {"1": True, "true": True, "0": False, "false": False}


async def show_item(request: web.Request) -> web.Response:
    """`GET /v1/items/{item_id}`."""
    service = request.app[SERVICE]
    refuse_parameters(request, "vector")
    item_id = request.match_info["item_id"]
    if not is_identifier(item_id):
        raise ApiError(400, "bad_request", f"an item id is a printable text of at most {MAX_ID_CHARACTERS} characters")
    with_vector = _FLAGS.get(request.query.get("vector", "0"))
    if with_vector is None:
        raise ApiError(400, "bad_request", "?vector is 1 or 0")
    row = (await service.index.fetch([item_id], fresh=False)).get(item_id)
    if row is None:
        raise ApiError(404, "item_not_found", f"the center does not hold item {item_id!r}")
    return _json(
        ItemView(
            item_id=row.item_id,
            encoder_version=row.encoder_version,
            content_hash=row.content_hash,
            published_at=row.published_at,
            category=row.category,
            price=row.price,
            has_title=row.has_title,
            has_image=row.has_image,
            source_partition=row.source_partition,
            source_offset=row.source_offset,
            vector=row.vector.tolist() if with_vector else None,
        )
    )


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`."""
    page = request.app[SERVICE].metrics_page()
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def healthz(request: web.Request) -> web.Response:
    """`GET /healthz`: the event loop runs."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """`GET /readyz`: 200 if every check is `ok`, else 503 with the reasons."""
    service = request.app[SERVICE]
    checks = await readiness(service)
    ready = all(state == "ok" for state in checks.values())
    answer = {"ready": ready, "checks": checks, "unconfirmed": unconfirmed(service)}
    return web.json_response(answer, status=200 if ready else 503)


def unconfirmed(service: ScoringService) -> list[str]:
    """What holds a score up but does not prevent it."""
    told = []
    if service.vector_cache.behind_seconds > service.config.cache.max_staleness_seconds:
        told.append("Kafka does not tell which vectors changed: each is read from the representation center again")
    if service.states.behind_seconds > service.config.cache.max_staleness_seconds:
        told.append("Kafka does not tell what is taken: scores rest on the takes that were known before")
    elif service.states.copies.head is None:
        told.append("no trainer has written what is taken for these features: scores rest on no takes of others")
    return told


async def readiness(service: ScoringService) -> dict[str, str]:
    """The dependencies of a score: `ok`, or why not, in words that may be shown outside."""

    async def probe(call: Awaitable[object], what: str) -> str:
        try:
            await asyncio.wait_for(call, service.config.ready_timeout_seconds)
        except (PipelineError, TimeoutError) as error:
            log.warning("serve.not_ready", what=what, error=str(error) or "timed out")
            return f"{what} does not answer"
        return "ok"

    behaviours, center = await asyncio.gather(
        probe(service.behaviours.ping(), "the behaviour store"),
        probe(service.index.fetch(["readiness probe"], fresh=False), "the representation center"),
    )
    if service.models.current is not None:
        model = "ok"
    else:
        model = "the newest release cannot be used" if service.models.problem else "no model has been released yet"
    states = "what was taken is still being read" if service.states.is_reading else "ok"
    return {"behaviours": behaviours, "center": center, "model": model, "states": states}


def _json(answer: Message) -> web.Response:
    return _answer(answer.model_dump_json().encode())


def _answer(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
