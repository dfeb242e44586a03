"""What each process and command needs of Kafka, Redis and Milvus: for `mimstream check`, and for who grants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streams.broker.topics import TOPICS, TopicName, TopicsConfig

Role = Literal["index", "record", "train", "serve"]
ROLES: tuple[Role, ...] = get_args(Role)

ALL: tuple[TopicName, ...] = tuple(TOPICS)


@dataclass(frozen=True)
class Rights:
    """What one process or command does. Reading and writing a topic include describing it."""

    reads: tuple[TopicName, ...] = ()
    writes: tuple[TopicName, ...] = ()
    for_queries: tuple[TopicName, ...] = ()
    """Those of them that it uses only where it handles what users search for."""
    other: str = ""
    """Groups, ids and rights beside those on topics; `<prefix>` is MIM_TOPICS__PREFIX."""
    joins: str = ""
    """The group that it is a member of, without prefix."""
    transactional_id: str = ""
    """The id of its transactions, without prefix."""
    redis: str = ""
    milvus: str = ""

    @property
    def topics(self) -> tuple[TopicName, ...]:
        """Topics that must be there, in the table's order."""
        return tuple(name for name in TOPICS if name in self.reads or name in self.writes)

    def needed(self, *, queries: bool) -> tuple[TopicName, ...]:
        """Topics that must be there for a process that handles searches, or does not."""
        return tuple(name for name in self.topics if queries or name not in self.for_queries)

    @property
    def beside_topics(self) -> str:
        """All that it needs of Kafka beside rights on topics."""
        told = [f"group <prefix>{self.joins}: Read"] if self.joins else []
        told += [f"transactional id <prefix>{self.transactional_id}: Write, Describe"] if self.transactional_id else []
        return "; ".join([*told, self.other] if self.other else told)


RIGHTS: dict[str, Rights] = {
    "index": Rights(
        reads=("items", "items-retry", "embeddings", "behaviours"),
        writes=("embeddings", "items-retry", "dead-letters", "queries"),
        for_queries=("behaviours", "queries"),
        joins="index",
        redis="read, write",
        milvus="read, write, create collections and aliases",
    ),
    "record": Rights(
        reads=("behaviours", "forgotten", "items"),
        writes=("dead-letters",),
        joins="record",
        redis="read, write",
    ),
    "train": Rights(
        reads=("behaviours", "embeddings", "queries", "item-states", "skew", "forgotten", "models"),
        writes=("item-states", "skew", "models"),
        for_queries=("queries",),
        joins="train",
        transactional_id="train",
    ),
    "serve": Rights(reads=("embeddings", "item-states", "models"), writes=("skew",), redis="read", milvus="read"),
    "center verify": Rights(reads=("items", "embeddings"), other="group <prefix>index: Describe", milvus="read"),
    "center verify --repair": Rights(
        reads=("items", "embeddings"),
        writes=("embeddings", "items-retry", "dead-letters"),
        other="group <prefix>index: Describe",
        milvus="read, write, create collections and aliases",
    ),
    "dead-letters": Rights(
        reads=("dead-letters", "items", "behaviours", "items-retry"), writes=("dead-letters", "items", "behaviours")
    ),
    "replay": Rights(writes=("items", "behaviours"), other="with --follow ROLE: group <prefix>ROLE: Describe"),
    "import": Rights(writes=("items",), other="with --follow ROLE: group <prefix>ROLE: Describe"),
    "forget": Rights(reads=("behaviours",), writes=("forgotten",)),
    "models": Rights(writes=("models",)),
    "skew": Rights(reads=("skew",)),
    "trainset": Rights(reads=("behaviours", "embeddings", "forgotten")),
    "pretrain": Rights(reads=("items",)),
    "csft": Rights(reads=("items", "behaviours", "forgotten")),
    "topics create": Rights(other="Create on the cluster, or on topics that begin with <prefix>"),
    "check": Rights(
        reads=ALL,
        other="DescribeConfigs on the topics",
        redis="what the roles need, INFO and CONFIG GET",
        milvus="read",
    ),
}

REDIS_COMMANDS = (
    "DEL EVAL EXEC EXISTS GET HDEL HGET HGETALL HINCRBY HMGET HSCAN HSET MGET MULTI PEXPIRE PING PTTL SADD SCAN "
    "SET SMEMBERS UNLINK UNWATCH WATCH ZADD ZCARD ZMSCORE ZREM ZREMRANGEBYSCORE"
)
"""What the roles say to Redis, beside AUTH, HELLO, SELECT, CLIENT SETINFO and CLUSTER INFO of every connection."""

HEADS = ("who", "reads topics", "writes topics", "other rights in Kafka", "Redis", "Milvus")


def rights_table(topics: TopicsConfig | None = None) -> list[tuple[str, ...]]:
    """One row per process and command, under `HEADS`; with the names on the cluster if `topics` gives the prefix."""

    def named(names: tuple[TopicName, ...]) -> str:
        return ", ".join(topics.full_name(name) if topics is not None else name for name in names)

    return [
        (
            who,
            named(rights.reads),
            named(rights.writes),
            rights.beside_topics if topics is None else rights.beside_topics.replace("<prefix>", topics.prefix),
            rights.redis,
            rights.milvus,
        )
        for who, rights in RIGHTS.items()
    ]


def rights_markdown() -> str:
    """The table of `deploy/README.md`."""

    def code(text: str) -> str:
        return ", ".join(f"`{name}`" for name in text.split(", ") if name)

    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    for who, reads, writes, *others in rights_table():
        lines.append("| " + " | ".join([code(who), code(reads), code(writes), *others]) + " |")
    return "\n".join(lines)
