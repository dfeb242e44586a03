"""The pre-flight behind `mimstream check`: every connection and setting, each with a fix."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from encoders.base import Encoder
from schemas.errors import PipelineError
from schemas.items import largest_picture, record_bytes_for
from streams.broker.clients import broker_errors
from streams.broker.cluster import ClusterTopics, describe_topics, read_incarnation
from streams.broker.log_reader import LogReader
from streams.broker.partitioning import FIX, Partitioning
from streams.broker.records import behaviour_of
from streams.broker.topics import TOPICS, TopicName, TopicSpec
from streams.settings import Settings
from streams.stores.artifacts.config import NEW_STORE
from streams.stores.artifacts.registry import open_registry
from streams.stores.histories.client import make_redis, redis_errors
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.histories.store import foreign_log
from streams.stores.vectors.collection import CollectionInfo, read_center
from streams.training.click_log_watch import NO_EXPOSURES, click_log_problem

_WRITTEN_BY_OTHERS: tuple[TopicName, ...] = ("items", "behaviours")
_NEWEST_KEYS = 200

_SAMPLE = 2_000
"""Newest events of the click log that are looked at."""
EMBEDDED = "'mimstream stack up' starts an embedded one (then add --stack default)"


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One line of the pre-flight."""

    name: str
    ok: bool
    detail: str
    """What was found, or what is wrong."""
    fix: str | None = None
    """What to do about it."""


class _CheckFailed(Exception):
    """A check that failed, with its fix."""

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fix = fix


async def run_checks(settings: Settings, load_encoder: Callable[[], Encoder]) -> list[CheckLine]:
    """Run all checks. One that fails skips only those that depend on it."""
    broker = await _line(
        "broker", lambda: _broker(settings), f"start it, or set MIM_KAFKA__BOOTSTRAP_SERVERS; {EMBEDDED}"
    )
    lines = [broker]
    if broker.ok:
        lines.append(await _line("topics", lambda: _topics(settings), "run 'mimstream topics create'"))
        if lines[-1].ok:
            lines.append(await _line("partitioner", lambda: _partitioner(settings), FIX))
            lines.append(await _line("click log", lambda: _click_log(settings), NO_EXPOSURES))
    redis = await _line("redis", lambda: _redis(settings), f"start it, or set MIM_REDIS__URL; {EMBEDDED}")
    lines.append(redis)
    if redis.ok and broker.ok:
        lines.append(await _line("behaviour view", lambda: _view(settings), "run 'mimstream record --rebuild'"))
    lines.append(picture_sizes(settings))
    encoders: list[Encoder] = []
    lines.append(
        await _line(
            "encoder", lambda: _encoder(load_encoder, encoders), "set MIM_ENCODER__BUNDLE to a bundle, or unset it"
        )
    )
    centers: list[CollectionInfo | None] = []
    lines.append(
        await _line(
            "milvus", lambda: _center(settings, encoders, centers), f"start it, or set MIM_MILVUS__URI; {EMBEDDED}"
        )
    )
    expected = centers[0].encoder_version if centers and centers[0] else (encoders[0].version if encoders else None)
    lines.append(await _line("model", lambda: _model(settings, expected), "set MIM_MODELS__FOLDER or MIM_MODELS__URL"))
    return lines


async def _line(name: str, check: Callable[[], Awaitable[str]], fix: str) -> CheckLine:
    try:
        return CheckLine(name, True, await check())
    except _CheckFailed as error:
        return CheckLine(name, False, error.detail, error.fix)
    except PipelineError as error:
        return CheckLine(name, False, str(error), fix)


async def _broker(settings: Settings) -> str:
    from aiokafka.admin import AIOKafkaAdminClient  # fails at once where nothing listens; kafka-python tries for 30 s

    client = AIOKafkaAdminClient(**settings.kafka.client_options())
    try:
        with broker_errors(settings.kafka):
            await client.start()
            described = await client.describe_cluster()
    finally:
        await client.close()
    return (
        f"{settings.kafka.bootstrap_servers}, {len(described['brokers'])} broker(s), cluster {described['cluster_id']}"
    )


async def _topics(settings: Settings) -> str:
    found = await asyncio.to_thread(
        describe_topics, settings.kafka, settings.topics, TOPICS, with_configs=True, missing_ok=True
    )
    wrong: list[str] = []
    fixes: list[str] = []
    for spec in TOPICS.values():
        for problem, fix in topic_problems(spec, settings, found):
            wrong.append(problem)
            fixes.append(fix)
    if wrong:
        raise _CheckFailed("; ".join(wrong), "; ".join(dict.fromkeys(fixes)))
    return f"{len(TOPICS)} topics with prefix {settings.topics.prefix!r}"


async def _partitioner(settings: Settings) -> str:
    """Look at the newest keys of the topics that others write."""
    found = []
    async with LogReader(settings.kafka, settings.topics) as reader:
        for name in _WRITTEN_BY_OTHERS:
            partitions = await reader.partitions(name)
            keys = []
            for partition, (start, end) in (await reader.bounds(partitions)).items():
                async for record in reader.read(partition, max(start, end - _NEWEST_KEYS), end):
                    if record.key is not None:
                        keys.append((record.key, record.partition))
            how = Partitioning.of(keys, len(partitions))
            told = f"{how.by_murmur2} of the newest {how.keys} keys of {name} lie where murmur2 puts them"
            if how.is_mixed:
                raise _CheckFailed(f"{told}, the others do not: producers hash keys differently", FIX)
            found.append(told if how.keys == how.by_murmur2 else f"all {how.keys} of {name} where CRC32 puts them")
    return "; ".join(found)


def topic_problems(spec: TopicSpec, settings: Settings, found: ClusterTopics) -> list[tuple[str, str]]:
    """Compare one topic with the table: (what is wrong, how to fix it) each."""
    name = settings.topics.full_name(spec.name)
    if spec.name not in found.partitions:
        return [(f"{name} is missing", "run 'mimstream topics create'")]
    problems: list[tuple[str, str]] = []
    wanted, partitions = spec.partitions(settings.topics), len(found.partitions[spec.name])
    config = found.configs.get(spec.name, {})
    if partitions != wanted:
        problems.append(
            (
                f"{name} has {partitions} partitions, the settings say {wanted}",
                f"set MIM_TOPICS__PARTITIONS={partitions} (a keyed topic must not change its number)",
            )
        )
    policy = "compact" if spec.compacted else "delete"
    if policy not in config.get("cleanup.policy", policy).split(","):
        problems.append(
            (
                f"{name} has cleanup.policy={config['cleanup.policy']}, not {policy}",
                f"set its cleanup.policy to {policy} on the cluster",
            )
        )
    room = spec.max_record_bytes(settings.kafka)
    if int(config.get("max.message.bytes", room)) < room:
        problems.append(
            (
                f"{name} takes records of {config['max.message.bytes']} bytes, {room} are needed",
                f"set its max.message.bytes to {room} on the cluster, or lower MIM_KAFKA__MAX_RECORD_BYTES",
            )
        )
    return problems


def picture_sizes(settings: Settings) -> CheckLine:
    """Compare the largest picture that is decoded with what a record and a fetch can bring."""
    decoded, fetched = settings.encoder.max_image_bytes, settings.images.max_bytes
    in_record = largest_picture(settings.kafka.max_record_bytes)
    found = f"decoded up to {decoded:,} bytes; a record holds up to {in_record:,}, a URL leads to up to {fetched:,}"
    if max(in_record, fetched) < decoded:
        fix = (
            f"raise MIM_IMAGES__MAX_BYTES to {decoded}, or MIM_KAFKA__MAX_RECORD_BYTES to {record_bytes_for(decoded)} "
            "(and max.message.bytes of the topics with it), or lower MIM_ENCODER__MAX_IMAGE_BYTES"
        )
        return CheckLine("pictures", False, found, fix)
    return CheckLine("pictures", True, found if in_record >= decoded else f"{found}; larger ones need an image_url")


async def _click_log(settings: Settings) -> str:
    kinds: Counter[str] = Counter()
    async with LogReader(settings.kafka, settings.topics) as reader:
        bounds = await reader.bounds(await reader.partitions("behaviours"))
        for partition, (first, end) in bounds.items():
            async for record in reader.read(partition, max(first, end - _SAMPLE // len(bounds)), end):
                behaviour = behaviour_of(record, settings.kafka, settings.record.field_map)
                kinds["unreadable" if behaviour is None else behaviour.kind] += 1
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing yet"
    readable = {kind: count for kind, count in kinds.items() if kind != "unreadable"}
    problem = click_log_problem(readable, draws=settings.trainer.draw_exposures > 0)
    if problem is not None:
        raise _CheckFailed(f"the newest events are {found}: {problem}", NO_EXPOSURES)
    return f"the newest events: {found}"


async def _redis(settings: Settings) -> str:
    client: Any = make_redis(settings.redis)
    try:
        with redis_errors(settings.redis):
            await client.ping()
            try:
                policy = (await client.config_get("maxmemory-policy")).get("maxmemory-policy", "")
            except ResponseError:  # managed servers refuse it
                return settings.redis.shown_url
    finally:
        await client.aclose()
    if policy.startswith("allkeys"):
        raise _CheckFailed(
            f"maxmemory-policy is {policy}: when memory is short it evicts positions and histories behind our back",
            "set maxmemory-policy to noeviction, or give the view a server of its own",
        )
    return f"{settings.redis.shown_url}, maxmemory-policy {policy}"


async def _view(settings: Settings) -> str:
    store = RedisBehaviourStore(make_redis(settings.redis), settings.redis, settings.behaviours)
    try:
        bound = await store.bound_log()
        if bound is None:
            return "empty; 'mimstream record' fills it"
        current = await asyncio.to_thread(read_incarnation, settings.kafka, settings.topics, "behaviours")
        if bound != current:
            raise foreign_log(bound, current)
        counts = await store.counts()
    finally:
        await store.close()
    return f"{counts['takes']} takes and {counts['exposures']} exposures of {current.topic}"


async def _encoder(load: Callable[[], Encoder], loaded: list[Encoder]) -> str:
    encoder = await asyncio.to_thread(load)
    loaded.append(encoder)
    return f"{encoder.version}, {encoder.dim}-d"


async def _center(settings: Settings, encoders: list[Encoder], centers: list[CollectionInfo | None]) -> str:
    center = await read_center(settings.milvus)
    centers.append(center)
    if center is None:
        return f"{settings.milvus.shown_uri}, nothing indexed yet"
    held = f"{center.name} ({center.encoder_version or 'empty'}, {center.dim}-d)"
    fix = (
        "set MIM_ENCODER__BUNDLE to the one that made them, or MIM_MILVUS__ALIAS to a new name to build another center"
    )
    if encoders and encoders[0].dim != center.dim:
        raise _CheckFailed(f"{held} holds {center.dim}-d vectors, the encoder makes {encoders[0].dim}-d", fix)
    if encoders and center.encoder_version not in (None, encoders[0].version):
        raise _CheckFailed(f"{held} holds vectors of another encoder than {encoders[0].version}", fix)
    return f"{settings.milvus.shown_uri}, {held}"


async def _model(settings: Settings, encoder_version: str | None) -> str:
    store = open_registry(settings.models)
    pointer = await asyncio.to_thread(store.current)
    if pointer is None:
        return f"nothing released in {settings.models.url or settings.models.folder} yet; 'mimstream train' does"
    _, manifest = await asyncio.to_thread(store.load, pointer.release_id)
    if encoder_version not in (None, manifest.encoder_version):
        raise _CheckFailed(
            f"release {manifest.release_id} goes with encoder {manifest.encoder_version}, the center with "
            f"{encoder_version}",
            "set MIM_MODELS__FOLDER (or MIM_MODELS__URL) to the releases of this encoder, or train anew with "
            f"{NEW_STORE}",
        )
    return f"{manifest.release_id}, {manifest.rows_trained} rows trained"
