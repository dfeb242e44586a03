"""The pre-flight is green only for what it looked at."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoPermissionError, ResponseError

from schemas.errors import PipelineError
from streams.broker.cluster import ClusterTopics
from streams.broker.rights_asked import Answers
from streams.broker.topics import TOPICS, TopicsConfig, TopicSpec
from streams.commands.check import EXIT_UNKNOWN, exit_status
from streams.settings import Settings
from streams.stores.histories.client import RedisConfig
from streams.stores.histories.server import RedisServer, describe_server
from streams.wiring import rights
from streams.wiring.preflight import (
    CheckLine,
    _CheckFailed,
    _CheckUnknown,
    _model,
    judge_groups,
    judge_redis,
    why_not_writable,
)
from streams.wiring.topic_checks import right_problems, specs_of, topic_problems, unseen

ROOT = Path(__file__).parents[4]
SETTINGS = Settings()
REDIS = RedisConfig()


def cluster(brokers: int = 1, replicas: int = 1, **changed: Any) -> ClusterTopics:
    """What `topics create` makes, with every setting as it asks for it, and all rights."""
    return replace(
        ClusterTopics(
            cluster_id="c",
            topic_ids={name: f"id-{name}" for name in TOPICS},
            partitions={name: list(range(spec.partitions(SETTINGS.topics))) for name, spec in TOPICS.items()},
            configs={
                name: {"min.insync.replicas": "2" if replicas > 2 else "1"}
                | spec.settings(SETTINGS.topics, SETTINGS.kafka)
                for name, spec in TOPICS.items()
            },
            replicas=dict.fromkeys(TOPICS, replicas),
            rights={name: frozenset({"READ", "WRITE"}) for name in TOPICS},
            brokers=brokers,
        ),
        **changed,
    )


def with_config(name: str, **config: str) -> ClusterTopics:
    found = cluster()
    found.configs[name] |= {key.replace("_", "."): value for key, value in config.items()}
    return found


def told(found: ClusterTopics, settings: Settings = SETTINGS) -> str:
    return "; ".join(what for spec in TOPICS.values() for what, _ in topic_problems(spec, settings, found))


def test_topics_as_they_are_created_are_fine_with_any_number_of_replicas() -> None:
    for found in (cluster(), cluster(brokers=3, replicas=3), cluster(brokers=3, replicas=2)):
        assert told(found) == ""
        assert unseen(TOPICS, SETTINGS, found) == right_problems(rights.ROLES, SETTINGS, found) == []


def each_setting() -> list[tuple[TopicSpec, str, str]]:
    return [
        (spec, key, value)
        for spec in TOPICS.values()
        for key, value in spec.settings(SETTINGS.topics, SETTINGS.kafka).items()
    ]


@pytest.mark.parametrize(("spec", "key", "value"), each_setting(), ids=lambda one: getattr(one, "name", one))
def test_every_setting_that_a_topic_is_created_with_is_checked(spec: TopicSpec, key: str, value: str) -> None:
    others = [one for one in ("compact", "delete", "compact,delete") if one != value]
    for worse in others if "policy" in key else ["60000"]:
        if int(value if value.isdigit() else 99_999_999) <= 60_000 and "policy" not in key:
            worse = "1"
        found = with_config(spec.name, **{key: worse})
        assert f"{spec.name} has {key}={worse}" in told(found)


def test_more_than_is_needed_is_no_fault() -> None:
    assert told(with_config("items", delete_retention_ms=str(10**12), max_message_bytes=str(10**9))) == ""
    assert told(with_config("behaviours", retention_ms="-1")) == ""


@pytest.mark.parametrize(
    ("found", "topics", "word"),
    [
        (cluster(brokers=3, replicas=1), TopicsConfig(), "1 replica(s) on a cluster of 3"),
        (cluster(brokers=3, replicas=1), TopicsConfig(replication_factor=1), ""),
        (cluster(brokers=3, replicas=2), TopicsConfig(replication_factor=3), "2 replica(s)"),
        (cluster(brokers=1, replicas=1), TopicsConfig(), ""),
    ],
)
def test_too_few_replicas_are_told(found: ClusterTopics, topics: TopicsConfig, word: str) -> None:
    said = told(found, SETTINGS.model_copy(update={"topics": topics}))
    assert word in said if word else not said


def test_a_write_that_one_broker_alone_has_is_told() -> None:
    found = cluster(brokers=3, replicas=3)
    found.configs["items"]["min.insync.replicas"] = "1"
    assert "items has min.insync.replicas=1" in told(found)
    accepted = SETTINGS.model_copy(update={"topics": TopicsConfig(min_insync_replicas=1)})
    assert told(found, accepted) == ""


def test_three_replicas_are_created_with_two_in_sync() -> None:
    for config, expected in (
        (TopicsConfig(), None),
        (TopicsConfig(replication_factor=2), None),
        (TopicsConfig(replication_factor=3), "2"),
        (TopicsConfig(replication_factor=3, min_insync_replicas=1), "1"),
    ):
        for spec in TOPICS.values():
            assert spec.settings(config, SETTINGS.kafka).get("min.insync.replicas") == expected


def test_topics_that_a_login_may_not_see_are_unknown_and_not_missing() -> None:
    found = cluster(hidden=frozenset({"models"}))
    del found.partitions["models"], found.configs["models"], found.replicas["models"]
    assert told(found) == ""
    ((what, fix),) = unseen(TOPICS, SETTINGS, found)
    assert "mim.models" in what and "--for ROLE" in fix
    assert "mim.models is missing" in told(replace(found, hidden=frozenset()))


def test_settings_that_a_login_may_not_read_are_unknown() -> None:
    found = cluster(configs={})
    ((what, fix),) = unseen(["items", "models"], SETTINGS, found)
    assert "mim.items, mim.models" in what and "DescribeConfigs" in fix


def test_a_right_that_a_role_lacks_is_told_for_that_role_alone() -> None:
    found = cluster(rights={name: frozenset({"READ"}) for name in TOPICS})
    ((what, _),) = right_problems(["train"], SETTINGS, found)
    assert "may not write mim.item-states, mim.skew, mim.models" in what
    ((what, _),) = right_problems(["serve"], SETTINGS, found)
    assert "may not write mim.skew" in what
    assert right_problems(["csft"], SETTINGS, found) == []
    assert right_problems(rights.ROLES, SETTINGS, cluster(rights={})) == []  # the broker does not say
    assert {spec.name for spec in specs_of(["serve"], SETTINGS)} == {"embeddings", "item-states", "skew", "models"}


@pytest.mark.parametrize("policy", ["volatile-lru", "volatile-ttl", "allkeys-lru", "allkeys-random", "volatile-lfu"])
def test_a_server_that_may_evict_histories_is_refused(policy: str) -> None:
    with pytest.raises(_CheckFailed, match=policy):
        judge_redis(RedisServer("7.0.0", policy, 1 << 30), REDIS)
    judge_redis(RedisServer("7.0.0", policy, 0), REDIS)  # without a limit nothing is evicted
    with pytest.raises(_CheckFailed, match=policy):
        judge_redis(RedisServer("7.0.0", policy, None), REDIS)


def test_a_server_that_does_not_say_what_it_is_is_unknown() -> None:
    judge_redis(RedisServer("6.2.1", "noeviction", 5), REDIS)
    for missing in ({"policy": None}, {"version": None}):
        with pytest.raises(_CheckUnknown):
            judge_redis(replace(RedisServer("7.0.0", "noeviction", 0), **missing), REDIS)  # type: ignore[arg-type]
    for new in ("6.2.0", "6.10.0", "7.0.0", "10.1.2"):
        assert f"version {new}" in judge_redis(RedisServer(new, "noeviction", 0), REDIS)
    for old in ("6.0.16", "5.0", "6.1.99"):
        with pytest.raises(_CheckFailed, match=old):
            judge_redis(RedisServer(old, "noeviction", 0), REDIS)


class Server:
    """Answers INFO and CONFIG GET, or refuses them."""

    def __init__(self, info: dict[str, dict[str, Any]] | None, config: dict[str, str] | None) -> None:
        self._info, self._config = info, config

    async def ping(self) -> bool:
        return True

    async def info(self, section: str) -> dict[str, Any]:
        if self._info is None:
            raise NoPermissionError("this user has no permissions to run the 'info' command")
        return self._info.get(section, {})

    async def config_get(self, pattern: str) -> dict[str, str]:
        if self._config is None:
            raise ResponseError("unknown command 'CONFIG'")
        return self._config


async def test_what_one_command_does_not_tell_another_may() -> None:
    managed = {
        "server": {"redis_version": "7.2.4"},
        "memory": {"maxmemory_policy": "volatile-lru", "maxmemory": 9},
    }
    assert await describe_server(Server(managed, None), REDIS) == RedisServer("7.2.4", "volatile-lru", 9)
    own = {"maxmemory": "0", "maxmemory-policy": "noeviction"}
    assert await describe_server(Server(None, own), REDIS) == RedisServer(None, "noeviction", 0)
    assert await describe_server(Server(None, None), REDIS) == RedisServer(None, None, None)


def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_left_in_one_that_can(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "not" / "yet") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (Path("/proc/mimstream/models"), tmp_path / "file"):
        assert str(folder if folder.exists() else "/proc") in (why_not_writable(folder) or "")


async def test_a_server_needs_no_right_to_write_models_and_a_trainer_does() -> None:
    nowhere = SETTINGS.models.model_copy(update={"folder": Path("/proc/mimstream/models"), "url": None})
    settings = SETTINGS.model_copy(update={"models": nowhere})
    assert "nothing released" in await _model(settings, None, writes=False)
    with pytest.raises(PipelineError, match="MIM_MODELS__FOLDER"):
        await _model(settings, None, writes=True)


def test_a_refused_group_fails_and_one_that_the_broker_says_nothing_of_is_unknown() -> None:
    assert judge_groups(Answers(["read group g"])) == "this login may read group g"
    with pytest.raises(_CheckFailed, match="may not read group g"):
        judge_groups(Answers(["write transactional id t"], ["read group g"], ["read group h"]))
    with pytest.raises(_CheckUnknown, match="does not say whether this login may read group h"):
        judge_groups(Answers(["read group g"], unknown=["read group h"]))


def test_what_is_unknown_has_an_exit_status_of_its_own() -> None:
    ok, failed, unknown = (CheckLine("x", state, "") for state in ("ok", "failed", "unknown"))  # type: ignore[arg-type]
    assert exit_status([ok]) == 0
    assert exit_status([ok, unknown]) == EXIT_UNKNOWN
    assert exit_status([unknown, failed]) == 1
    assert [line.ok for line in (ok, failed, unknown)] == [True, False, False]


def commands_in_source() -> set[str]:
    room = ROOT / "streams" / "stores" / "histories"
    text = "\n".join(path.read_text() for path in [*room.glob("*.py"), ROOT / "streams" / "indexing" / "slots.py"])
    said = set(re.findall(r"redis\.call\(['\"]([A-Z]+)['\"]", text))
    said |= set(re.findall(r"execute_command\(\s*\"([A-Z]+)\"", text))
    methods = set(re.findall(r"(?:client|redis|pipe)\.([a-z]+)\(", text))
    return said | {
        name.upper().replace("DELETE", "DEL") for name in methods - {"aclose", "pipeline", "execute", "call"}
    }


def test_the_redis_commands_that_are_listed_are_those_that_are_used() -> None:
    used = commands_in_source() | {"EXEC", "UNWATCH"}  # sent by pipelines
    used -= {"INFO"}  # of the check
    assert used == set(rights.REDIS_COMMANDS.split())


def test_every_command_that_uses_topics_has_a_row() -> None:
    reading = {"topics", "check"}
    for path in (ROOT / "streams" / "commands").glob("*.py"):
        if re.search(r"from streams\.(broker\.(clients|log_reader|cluster)|wiring)", path.read_text()):
            reading.add({"import_": "import"}.get(path.stem, path.stem.replace("_", "-")))
    assert reading - {row.split()[0] for row in rights.RIGHTS} == {"evaluate", "bundle"}  # folders alone


def test_the_deploy_page_shows_the_table_of_rights() -> None:
    page = (ROOT / "deploy" / "README.md").read_text()
    assert rights.rights_markdown() in page
    assert rights.REDIS_COMMANDS in " ".join(page.split())
