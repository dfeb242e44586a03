"""`mimstream trainset show` over real Kafka: whatever the portions, after an update, a delete and an erasure."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from streams.broker.clients import make_admin
from streams.broker.topics import TopicName
from streams.commands.forget import forget_user
from streams.settings import Settings
from streams.stores.artifacts.registry import folder_registry
from tests.factories.click_world import SMALL, Run, World, produce
from tests.factories.item_feed import announced, feeding
from tests.factories.topics import delete_records, read_all
from tests.factories.waiting import until

pytestmark = pytest.mark.timeout(280)


async def test_a_release_is_rebuilt_after_compaction_update_delete_and_erasure(
    settings: Settings, run_command: Run, process: Callable[..., Any], tmp_path: Path
) -> None:
    def mimstream(*arguments: str) -> tuple[int, str]:
        done = run_command(*arguments, env=SMALL | {"MIM_MODELS__KEEP_RELEASES": "50"})
        assert done.returncode in (0, 1), done.stderr[-3000:]
        return done.returncode, done.stdout

    world = World()
    worker = process("index", env={"OMP_NUM_THREADS": "1"})
    async with feeding(settings) as feed:
        for item in world.items:
            await feed.publish(item, f"{item} as it was first")
    await until(lambda: announced(settings), lambda found: len(found) == len(world.items))
    await produce(settings, behaviours=world.behaviours(1500))
    mimstream("train", "--until-end", "--state", str(tmp_path / "state"))
    manifest = folder_registry(settings.models).list()[1]
    release = manifest.release_id

    status, printed = mimstream("trainset", "show", release, "--json")
    before = json.loads(printed)
    assert status == 0 and before["verified"] and before["rows"] == before["rebuilt"] == 512
    assert before["rows_tree_sha256"] == manifest.rows_tree_sha256
    assert any(row["negatives"] for row in before["training_rows"])

    learned_from = list(dict.fromkeys(row["item"] for row in before["training_rows"]))
    await change_and_compact(settings, world, updated=learned_from[0], deleted=learned_from[1])
    assert worker.stop() == 0
    status, again = mimstream("trainset", "show", release, "--json", "--fetch-max-records", "3")
    assert status == 0 and again == printed

    user = before["training_rows"][0]["user_id"]
    await forget_user(settings, user)
    out = tmp_path / "rows.parquet"
    status, printed = mimstream("trainset", "show", release, "--json", "--out", str(out))
    after, rows = json.loads(printed), pq.read_table(out).to_pylist()
    gone = [row for row in before["training_rows"] if row["user_id"] == user]
    assert status == 0 and after["verified"] and after["erased"] == len(gone) > 0
    assert [row["event_id"] for row in rows] == [
        row["event_id"] for row in before["training_rows"] if row["user_id"] != user
    ]
    assert user not in printed and user not in {row["user_id"] for row in rows}

    delete_records(settings, "behaviours", before=40)
    cold = process("trainset", "show", release, env=SMALL, cold=True)
    assert cold.wait() == 1 and "NOT verified" in cold.output()


async def change_and_compact(settings: Settings, world: World, *, updated: str, deleted: str) -> None:
    """Give an item other content, delete one, and make Kafka forget what items and vectors were before."""
    first = await announced(settings)
    names: tuple[TopicName, ...] = ("items", "embeddings")
    at_once = {"segment.ms": "100", "min.cleanable.dirty.ratio": "0.01", "max.compaction.lag.ms": "100"}
    with closing(make_admin(settings.kafka)) as admin:
        topics = [ConfigResource(ConfigResourceType.TOPIC, settings.topics.full_name(name), at_once) for name in names]
        admin.alter_configs(topics)
    async with feeding(settings) as feed:
        for number in range(3):  # what is compacted lies behind newer segments
            for item in world.items:
                if item == deleted:
                    await feed.delete(item)
                else:
                    title = f"{item} is something else now" if item == updated else f"{item} as it was first"
                    await feed.publish(item, title, price=float(number))

    async def forgotten() -> bool:
        for name in names:
            records = await read_all(settings, name)
            of_item = {key: [r.value for r in records if r.key.endswith(key.encode())] for key in (updated, deleted)}
            texts = [str(value) for value in of_item[updated]]
            if any(of_item[deleted]) or any(first[updated].content_hash in text for text in texts):  # type: ignore[union-attr]
                return False
            if not texts or any("as it was first" in text for text in texts):
                return False
        return True

    await until(forgotten, seconds=90, every=0.5)
    assert {item for item, message in (await announced(settings)).items() if message is not None} == (
        world.items.keys() - {deleted}
    )
