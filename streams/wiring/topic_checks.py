"""The pre-flight's look at topics: what is there against the table of topics, and what this login may do with it."""

from __future__ import annotations

from collections.abc import Iterable

from streams.broker.cluster import ClusterTopics
from streams.broker.topics import TOPICS, TopicName, TopicSpec
from streams.settings import Settings
from streams.wiring.rights import RIGHTS, Role

Problem = tuple[str, str]
"""What is wrong, and how to fix it."""

CREATE = "run 'mimstream topics create'"
GRANT = "grant what 'mimstream check --rights' lists, or look with that role's login: --for ROLE"

_UNLIMITED = -1
_AT_LEAST = frozenset({"max.message.bytes", "delete.retention.ms", "retention.ms", "retention.bytes"})
"""Settings of which more is no harm. `min.insync.replicas` is looked at together with the replicas."""


def topic_problems(spec: TopicSpec, settings: Settings, found: ClusterTopics) -> list[Problem]:
    """Compare one topic with the table. What may not be seen is no problem here: see `unseen`."""
    name = settings.topics.full_name(spec.name)
    if spec.name in found.hidden:
        return []
    if spec.name not in found.partitions:
        return [(f"{name} is missing", CREATE)]
    problems: list[Problem] = []
    wanted, partitions = spec.partitions(settings.topics), len(found.partitions[spec.name])
    if partitions != wanted and spec.single_partition:
        fix = "delete it, and run 'mimstream topics create'"
        problems.append((f"{name} has {partitions} partitions; it has to have one, for the order of its records", fix))
    elif partitions != wanted:
        problems.append(
            (
                f"{name} has {partitions} partitions, the settings say {wanted}",
                f"set MIM_TOPICS__PARTITIONS={partitions} (a keyed topic must not change its number)",
            )
        )
    config = found.configs.get(spec.name, {})
    for key, value in spec.settings(settings.topics, settings.kafka).items():
        held = config.get(key, value)
        if key != "min.insync.replicas" and not _is_enough(key, held, value):
            more = " or more" if key in _AT_LEAST else ""
            problems.append((f"{name} has {key}={held}, not {value}{more}", f"set its {key} to {value} on the cluster"))
    return problems + _replica_problems(spec, settings, found, name)


def _is_enough(key: str, held: str, wanted: str) -> bool:
    if key == "cleanup.policy":  # a list without order
        return {one.strip() for one in held.split(",")} == set(wanted.split(","))
    if key not in _AT_LEAST:
        return held == wanted
    if int(held) == _UNLIMITED:
        return True
    return int(wanted) != _UNLIMITED and int(held) >= int(wanted)


def _replica_problems(spec: TopicSpec, settings: Settings, found: ClusterTopics, name: str) -> list[Problem]:
    replicas = found.replicas.get(spec.name)
    if replicas is None:
        return []
    problems: list[Problem] = []
    wanted = settings.topics.replication_factor or min(found.brokers, 2)
    if replicas < wanted:
        problems.append(
            (
                f"{name} has {replicas} replica(s) on a cluster of {found.brokers} brokers: with that one broker goes "
                "what it holds",
                "reassign its partitions to more brokers, or set MIM_TOPICS__REPLICATION_FACTOR to what it has",
            )
        )
    held = int(found.configs.get(spec.name, {}).get("min.insync.replicas", 0))
    least = settings.topics.min_insync_replicas or (2 if replicas >= 3 else 1)
    if 0 < held < least:
        problems.append(
            (
                f"{name} has min.insync.replicas={held}: a record counts as written while one broker alone has it",
                f"set its min.insync.replicas to {least} on the cluster, or say MIM_TOPICS__MIN_INSYNC_REPLICAS={held}",
            )
        )
    return problems


def right_problems(roles: Iterable[Role], settings: Settings, found: ClusterTopics) -> list[Problem]:
    """What this login may not do with a topic that it sees, and a role has to."""
    problems: list[Problem] = []
    for role in roles:
        used = _used(role, settings)
        for right, names in (("READ", RIGHTS[role].reads), ("WRITE", RIGHTS[role].writes)):
            lacking = [
                name for name in names if name in used and name in found.rights and right not in found.rights[name]
            ]
            if lacking:
                topics = ", ".join(settings.topics.full_name(name) for name in lacking)
                problems.append(
                    (
                        f"this login may not {right.lower()} {topics}, as {role} has to",
                        GRANT,
                    )
                )
    return problems


def unseen(names: Iterable[TopicName], settings: Settings, found: ClusterTopics) -> list[Problem]:
    """What could not be looked at, and what would show it."""
    names = list(names)
    hidden = [settings.topics.full_name(name) for name in names if name in found.hidden]
    unread = found.partitions.keys() - found.configs.keys()
    closed = [settings.topics.full_name(name) for name in names if name in unread]
    told: list[Problem] = []
    if hidden:
        told.append(
            (
                f"{', '.join(hidden)}: not visible to this login, or missing",
                "grant Describe, or look with the login of one role: --for ROLE",
            )
        )
    if closed:
        told.append((f"settings of {', '.join(closed)}: not readable by this login", "grant DescribeConfigs on them"))
    return told


def specs_of(roles: Iterable[Role], settings: Settings) -> list[TopicSpec]:
    """The topics of these roles under their settings, in the table's order."""
    needed = {name for role in roles for name in _used(role, settings)}
    return [spec for spec in TOPICS.values() if spec.name in needed]


def _used(role: Role, settings: Settings) -> tuple[TopicName, ...]:
    handles_searches = {"index": settings.index.queries, "train": settings.trainer.features.queries}
    return RIGHTS[role].needed(queries=handles_searches.get(role, True))
