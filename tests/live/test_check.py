"""The pre-flight finds what is wrong and says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from kafka.admin import ConfigResource, ConfigResourceType
from numpy.typing import NDArray

from encoders.base import ItemContent, Prepared
from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig, make_admin
from streams.broker.cluster import TopicIncarnation
from streams.broker.topics import TopicsConfig, create_topics
from streams.settings import Settings
from streams.stores.histories.client import RedisConfig
from streams.stores.vectors.config import MilvusConfig
from streams.stores.vectors.milvus_index import MilvusItemIndex
from streams.wiring.preflight import CheckLine, run_checks
from tests.factories.recorded_log import behaviour_store

CHECKS = ["broker", "topics", "partitioner", "groups", "click log", "redis"]
CHECKS += ["behaviour view", "pictures", "encoder", "milvus", "model", "folders"]


class NamedEncoder:
    """Only its name and width matter to a check."""

    def __init__(self, version: str = "v-1", dim: int = 8) -> None:
        self.version = version
        self.dim = dim

    def prepare(self, content: ItemContent) -> Prepared:
        raise NotImplementedError

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        raise NotImplementedError


async def check(settings: Settings, encoder: NamedEncoder | None = None) -> dict[str, CheckLine]:
    lines = await run_checks(settings, lambda: encoder or NamedEncoder())
    return {line.name: line for line in lines}


async def test_a_fresh_system_passes(settings: Settings) -> None:
    lines = await check(settings)
    assert list(lines) == CHECKS
    assert all(line.ok and line.fix is None for line in lines.values()), lines


async def test_what_is_down_is_named_with_its_setting_and_the_rest_is_still_checked(settings: Settings) -> None:
    down = settings.model_copy(
        update={
            "kafka": BrokerConfig(bootstrap_servers="127.0.0.1:1"),
            "redis": RedisConfig(url="redis://127.0.0.1:1/0"),
            "milvus": MilvusConfig(uri="http://127.0.0.1:1", timeout_seconds=2),
        }
    )
    lines = await check(down)
    for name, variable in [
        ("broker", "MIM_KAFKA__BOOTSTRAP_SERVERS"),
        ("redis", "MIM_REDIS__URL"),
        ("milvus", "MIM_MILVUS__URI"),
    ]:
        assert not lines[name].ok
        assert variable in (lines[name].fix or "")
    assert lines["encoder"].ok and lines["model"].ok
    assert "topics" not in lines


async def test_missing_and_differing_topics_are_found(settings: Settings) -> None:
    missing = settings.model_copy(update={"topics": TopicsConfig(prefix=settings.topics.prefix + "x.")})
    line = (await check(missing))["topics"]
    assert not line.ok and line.fix == "run 'mimstream topics create'"
    more = settings.topics.model_copy(update={"partitions": settings.topics.partitions + 1})
    line = (await check(settings.model_copy(update={"topics": more})))["topics"]
    assert not line.ok and f"MIM_TOPICS__PARTITIONS={settings.topics.partitions}" in (line.fix or "")
    damage = {"cleanup.policy": "delete", "max.message.bytes": "1000"}
    with closing(make_admin(settings.kafka)) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, settings.topics.full_name("items"), damage)])
    line = (await check(settings))["topics"]
    assert "cleanup.policy=delete" in line.detail and "max.message.bytes=1000" in line.detail


def test_more_replicas_than_brokers_are_refused_with_the_setting(settings: Settings) -> None:
    topics = settings.topics.model_copy(update={"prefix": settings.topics.prefix + "x.", "replication_factor": 3})
    with pytest.raises(Misconfigured, match="MIM_TOPICS__REPLICATION_FACTOR"):
        create_topics(settings.kafka, topics)


async def test_vectors_of_another_width_are_found(settings: Settings) -> None:
    index = MilvusItemIndex(settings.milvus, encoder_version="v-1", dim=8)
    await index.open()
    await index.close()
    assert (await check(settings))["milvus"].ok
    line = (await check(settings, NamedEncoder(dim=16)))["milvus"]
    assert not line.ok and "8-d" in line.detail and "MIM_ENCODER__BUNDLE" in (line.fix or "")


async def test_a_view_of_another_log_is_found(settings: Settings) -> None:
    async with behaviour_store(settings) as store:
        await store.bind(TopicIncarnation("elsewhere", "t", "i"))
    line = (await check(settings))["behaviour view"]
    assert not line.ok and "record --rebuild" in (line.fix or "")


async def test_a_damaged_pointer_and_a_broken_encoder_are_found(settings: Settings) -> None:
    folder: Path = settings.models.folder
    folder.mkdir(parents=True)
    (folder / "current.json").write_text("{")

    def broken() -> NamedEncoder:
        raise Misconfigured("bundle 'x' does not exist")

    lines = {line.name: line for line in await run_checks(settings, broken)}
    assert not lines["model"].ok and "current.json" in lines["model"].detail
    assert not lines["encoder"].ok


@pytest.mark.parametrize("arguments", [("check",), ("check", "--json")])
def test_the_command_ends_with_1_when_something_is_wrong(process, arguments) -> None:  # type: ignore[no-untyped-def]
    child = process(*arguments, env={"MIM_REDIS__URL": "redis://127.0.0.1:1/0"}, cold="--json" in arguments)
    assert child.wait() == 1
    assert "MIM_REDIS__URL" in child.output().replace("\n", "")
    assert "Traceback" not in child.output()
