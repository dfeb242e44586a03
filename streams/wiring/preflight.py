"""The pre-flight behind `mimstream check`: every connection and setting, each with a fix."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from encoders.base import Encoder
from schemas.errors import PipelineError
from schemas.items import largest_picture, record_bytes_for
from streams.broker.clients import broker_errors
from streams.broker.cluster import describe_topics, read_incarnation
from streams.broker.log_reader import LogReader
from streams.broker.partitioning import FIX, Partitioning
from streams.broker.records import behaviour_of
from streams.broker.rights_asked import Answers, ask_for_rights
from streams.broker.topics import TopicName
from streams.settings import Settings
from streams.stores.artifacts.config import NEW_STORE
from streams.stores.artifacts.registry import open_registry
from streams.stores.histories.client import RedisConfig, make_redis
from streams.stores.histories.redis_store import RedisBehaviourStore
from streams.stores.histories.server import RedisServer, describe_server
from streams.stores.histories.store import foreign_log
from streams.stores.vectors.collection import CollectionInfo, read_center
from streams.training.click_log_watch import NO_EXPOSURES, click_log_problem
from streams.wiring.rights import RIGHTS, ROLES, Role
from streams.wiring.topic_checks import CREATE, GRANT, Problem, right_problems, specs_of, topic_problems, unseen

_WRITTEN_BY_OTHERS: tuple[TopicName, ...] = ("items", "behaviours")
_NEWEST_KEYS = 200

_SAMPLE = 2_000
"""Newest events of the click log that are looked at."""
EMBEDDED = "'mimstream stack up' starts an embedded one (then add --stack default)"


State = Literal["ok", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One line of the pre-flight."""

    name: str
    state: State
    """`unknown`: could not be looked at, so that nothing is said about it."""
    detail: str
    """What was found, or what is wrong."""
    fix: str | None = None
    """What to do about it."""

    @property
    def ok(self) -> bool:
        """Whether it was looked at and is right."""
        return self.state == "ok"


class _Judged(Exception):
    """A check that did not find everything right, with what to do."""

    state: State

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fix = fix


class _CheckFailed(_Judged):
    state = "failed"


class _CheckUnknown(_Judged):
    state = "unknown"


async def run_checks(
    settings: Settings, load_encoder: Callable[[], Encoder], roles: Sequence[Role] = ROLES
) -> list[CheckLine]:
    """Check what these roles need. A check that fails is followed by all but those that depend on it."""
    broker = await _line(
        "broker", lambda: _broker(settings), f"start it, or set MIM_KAFKA__BOOTSTRAP_SERVERS; {EMBEDDED}"
    )
    lines = [broker]
    if broker.ok:
        lines.append(await _line("topics", lambda: _topics(settings, roles), CREATE))
        topics = lines[-1]
        if written := [name for name in _WRITTEN_BY_OTHERS if any(name in RIGHTS[role].reads for role in roles)]:
            lines.append(await _after(topics, "partitioner", lambda: _partitioner(settings, written), FIX))
        if any(RIGHTS[role].joins for role in roles):
            lines.append(await _line("groups", lambda: _groups(settings, roles), GRANT))
        if "train" in roles:
            lines.append(await _after(topics, "click log", lambda: _click_log(settings), NO_EXPOSURES))
    if any(RIGHTS[role].redis for role in roles):
        redis = await _line("redis", lambda: _redis(settings), f"start it, or set MIM_REDIS__URL; {EMBEDDED}")
        lines.append(redis)
        if redis.state != "failed" and broker.ok:
            lines.append(await _line("behaviour view", lambda: _view(settings), "run 'mimstream record --rebuild'"))
    lines.append(picture_sizes(settings, roles))
    encoders: list[Encoder] = []
    centers: list[CollectionInfo | None] = []
    if any(RIGHTS[role].milvus for role in roles):
        fix = "set MIM_ENCODER__BUNDLE to a bundle, or unset it"
        lines.append(await _line("encoder", lambda: _encoder(load_encoder, encoders), fix))
        fix = f"start it, or set MIM_MILVUS__URI; {EMBEDDED}"
        lines.append(await _line("milvus", lambda: _center(settings, encoders, centers), fix))
    if "train" in roles or "serve" in roles:
        expected = centers[0].encoder_version if centers and centers[0] else (encoders[0].version if encoders else None)
        fix = "set MIM_MODELS__FOLDER or MIM_MODELS__URL"
        lines.append(await _line("model", lambda: _model(settings, expected, writes="train" in roles), fix))
    if "train" in roles:
        lines.append(await _line("folders", lambda: _folders(settings), ""))
    return lines


async def _after(topics: CheckLine, name: str, check: Callable[[], Awaitable[str]], fix: str) -> CheckLine:
    """A line about records, which can be read if all topics are there and visible."""
    if topics.ok:
        return await _line(name, check, fix)
    return CheckLine(name, "unknown", "not looked at, because of the line 'topics'", topics.fix)


async def _line(name: str, check: Callable[[], Awaitable[str]], fix: str) -> CheckLine:
    try:
        return CheckLine(name, "ok", await check())
    except _Judged as error:
        return CheckLine(name, error.state, error.detail, error.fix)
    except PipelineError as error:
        return CheckLine(name, "failed", str(error), fix)


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


async def _topics(settings: Settings, roles: Sequence[Role]) -> str:
    specs = specs_of(roles, settings)
    names = [spec.name for spec in specs]
    found = await asyncio.to_thread(
        describe_topics, settings.kafka, settings.topics, names, with_configs=True, missing_ok=True
    )
    problems = [one for spec in specs for one in topic_problems(spec, settings, found)]
    problems += right_problems(roles, settings, found)
    if problems:
        raise _CheckFailed(*_joined(problems))
    if unknown := unseen(names, settings, found):
        raise _CheckUnknown(*_joined(unknown))
    return f"{len(specs)} topics with prefix {settings.topics.prefix!r}"


async def _groups(settings: Settings, roles: Sequence[Role]) -> str:
    """Groups and transactional ids of these roles."""
    names = [settings.topics.group(RIGHTS[role].joins) for role in roles if RIGHTS[role].joins]
    ids = [settings.topics.group(RIGHTS[role].transactional_id) for role in roles if RIGHTS[role].transactional_id]
    return judge_groups(await ask_for_rights(settings.kafka, names, ids))


def judge_groups(answers: Answers) -> str:
    """What this login may do. Raises where it may not, or where the broker does not say."""
    if answers.refused:
        raise _CheckFailed(f"this login may not {', '.join(answers.refused)}", GRANT)
    if answers.unknown:
        raise _CheckUnknown(f"the broker does not say whether this login may {', '.join(answers.unknown)}", GRANT)
    return f"this login may {', '.join(answers.allowed)}"


def _joined(problems: Sequence[Problem]) -> tuple[str, str]:
    return "; ".join(what for what, _ in problems), "; ".join(dict.fromkeys(fix for _, fix in problems))


async def _partitioner(settings: Settings, names: Sequence[TopicName]) -> str:
    """Look at the newest keys of the topics that others write."""
    found = []
    async with LogReader(settings.kafka, settings.topics) as reader:
        for name in names:
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


def picture_sizes(settings: Settings, roles: Sequence[Role] = ROLES) -> CheckLine:
    """Compare the largest picture that is decoded with what a record, a fetch and a query can bring."""
    decoded, fetched = settings.encoder.max_image_bytes, settings.images.max_bytes
    in_record = largest_picture(settings.kafka.max_record_bytes)
    found = f"decoded up to {decoded:,} bytes; a record holds up to {in_record:,}, a URL leads to up to {fetched:,}"
    if max(in_record, fetched) < decoded:
        fix = (
            f"raise MIM_IMAGES__MAX_BYTES to {decoded}, or MIM_KAFKA__MAX_RECORD_BYTES to {record_bytes_for(decoded)} "
            "(and max.message.bytes of the topics with it), or lower MIM_ENCODER__MAX_IMAGE_BYTES"
        )
        return CheckLine("pictures", "failed", found, fix)
    if "serve" in roles and (asked := largest_picture(settings.serve.max_body_bytes)) < decoded:
        fix = f"raise MIM_SERVE__MAX_BODY_BYTES to {record_bytes_for(decoded)}, or lower MIM_ENCODER__MAX_IMAGE_BYTES"
        return CheckLine("pictures", "failed", f"{found}; a query has room for one of {asked:,} bytes only", fix)
    return CheckLine("pictures", "ok", found if in_record >= decoded else f"{found}; larger ones need an image_url")


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
        server = await describe_server(client, settings.redis)
    finally:
        await client.aclose()
    return judge_redis(server, settings.redis)


def judge_redis(server: RedisServer, config: RedisConfig) -> str:
    """What is right with a server. Raises where it is not, or where the server does not tell."""
    if server.is_too_old:
        raise _CheckFailed(
            f"Redis {server.version} at {config.shown_url} lacks commands that are used",
            "use Redis 6.2 or later, or any Valkey",
        )
    if server.evicts:
        raise _CheckFailed(
            f"maxmemory-policy is {server.policy}: when memory is short it evicts histories, and positions with them",
            "set maxmemory-policy to noeviction, or give the view a server of its own",
        )
    if None in (server.policy, server.version):
        raise _CheckUnknown(
            f"{config.shown_url} answers, but does not say what it evicts, or its version",
            "let this login run INFO and CONFIG GET for the check, or make sure that maxmemory-policy is noeviction "
            "and that it is Redis 6.2 or later",
        )
    return f"{config.shown_url}, version {server.version}, maxmemory-policy {server.policy}"


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


async def _model(settings: Settings, encoder_version: str | None, *, writes: bool) -> str:
    """The current release. A trainer has to write there; a server has to read, also where nobody may write."""
    store = open_registry(settings.models)
    if writes:
        await asyncio.to_thread(store.check)
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
    features = settings.trainer.features.version
    if manifest.features != features:
        raise _CheckFailed(
            f"release {manifest.release_id} reads features {manifest.features or 'of an earlier build'}, these "
            f"settings compute {features}: a server refuses it",
            "set MIM_TRAINER__FEATURES__... to what it was trained with, or train again with these settings",
        )
    return f"{manifest.release_id}, {manifest.rows_trained} rows trained"


async def _folders(settings: Settings) -> str:
    """What a trainer writes to; a server only reads the models."""
    config, train = settings.models, settings.train
    folders = {"MIM_TRAIN__STATE_FOLDER": train.state_folder}
    if train.snapshot_folder is not None or not config.url:
        folders["MIM_TRAIN__SNAPSHOT_FOLDER"] = train.snapshot_folder or config.folder
    if not config.url:
        folders["MIM_MODELS__FOLDER"] = config.folder
    wrong = {name: why for name, folder in folders.items() if (why := why_not_writable(folder)) is not None}
    if wrong:
        raise _CheckFailed(
            "; ".join(f"{name}: {why}" for name, why in wrong.items()),
            "make them writable for the trainer, or set them to other folders; a host without a trainer: "
            "--for index,record,serve",
        )
    tried = ", ".join(dict.fromkeys(str(folder) for folder in folders.values()))
    return f"{tried} can be written"


def why_not_writable(folder: Path) -> str | None:
    """Why files cannot be written in a folder that exists, or that would be made; None if they can. Leaves nothing."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"mimstream")
            file.flush()
    except OSError as error:
        return f"{existing} cannot be written ({error.strerror})"
    return None
