"""Slots of `mimstream index`: one worker each, and what happens to the work of one that is replaced, leaves or dies."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

from streams.settings import Settings
from tests.factories.index_worker import ONE_THREAD, Start, start_index
from tests.factories.item_feed import assert_ends_with_the_last_word, center, feeding, streaming_items
from tests.factories.waiting import until


async def test_a_second_worker_of_a_slot_is_turned_away_and_the_first_goes_on(
    settings: Settings, process: Start
) -> None:
    first = start_index(process)
    second = process("index", env=ONE_THREAD)
    assert second.wait(60) == 2
    assert "index-0" in second.output()
    assert "--slot" in second.output()
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("a", "still at work")
        await assert_ends_with_the_last_word(feed, index)
    assert first.returncode is None


async def test_a_worker_that_wakes_up_after_it_was_replaced_writes_nothing_and_ends(
    settings: Settings, process: Start
) -> None:
    sleeper = start_index(process)
    async with feeding(settings) as feed, center(settings) as index:
        async with streaming_items(feed, index, at_least=100, until_held=20):
            sleeper.send_signal(signal.SIGSTOP)  # in the middle of a batch, as likely as not
            successor = start_index(process)
        await assert_ends_with_the_last_word(feed, index)
        for item_id in sorted(feed.expected)[:50]:
            await feed.publish(item_id, "after the sleeper")
        await assert_ends_with_the_last_word(feed, index)
        said = len(sleeper.output())
        sleeper.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(sleeper.wait, 60) == 4
        assert "index-0" in sleeper.output()[said:]
        assert '"items.indexed"' not in sleeper.output()[said:]
        await feed.publish("last", "one more")
        await assert_ends_with_the_last_word(feed, index)
    assert successor.returncode is None


async def test_two_slots_share_the_work_and_one_that_leaves_comes_back(settings: Settings, process: Start) -> None:
    first = start_index(process)
    second = start_index(process, "--slot", "1")
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(60):
            await feed.publish(f"i{n}", f"title {n}")
        await assert_ends_with_the_last_word(feed, index)

        async def both_at_work() -> bool:
            await feed.publish(f"i{len(feed.ever)}", "more")
            return all("items.indexed" in worker.output() for worker in (first, second))

        await until(both_at_work)
        assert second.stop() == 0
        second = start_index(process, "--slot", "1")
        for n in range(60):
            await feed.publish(f"i{n}", f"title {n} again")
        await assert_ends_with_the_last_word(feed, index)


def assigned(worker: Any) -> dict[str, list[int]]:
    """What the worker was given last."""
    lines = [json.loads(line) for line in worker.output().splitlines() if '"index.assigned"' in line]
    return {"items": lines[-1]["items"], "items_retry": lines[-1]["items_retry"]}


async def test_an_item_and_its_retries_are_always_read_by_one_worker(settings: Settings, process: Start) -> None:
    # four partitions over three workers: handed out one by one, items-1 and items-retry-1 would part
    workers = [start_index(process, "--slot", name, MIM_ENCODER__NUM_THREADS="1") for name in "abc"]
    await until(lambda: sorted(p for worker in workers for p in assigned(worker)["items"]) == [0, 1, 2, 3])
    for worker in workers:
        assert assigned(worker)["items"] == assigned(worker)["items_retry"]


async def test_a_slot_that_does_not_come_back_leaves_at_once_or_is_taken_out(
    settings: Settings, process: Start
) -> None:
    env = {"MIM_INDEX__SESSION_TIMEOUT_SECONDS": "60"}  # longer than the test waits for what it expects
    stays = start_index(process, **env)
    leaves = start_index(process, "--slot", "1", "--leave", **env)
    await until(lambda: len(assigned(stays)["items"]) == len(assigned(leaves)["items"]) == 2)
    taking_out = process("index", "--slot", "1", "--remove", env=ONE_THREAD)
    assert await asyncio.to_thread(taking_out.wait, 60) == 2  # somebody lives in it
    assert leaves.stop() == 0
    assert "index.left_group" in leaves.output()
    await until(lambda: assigned(stays)["items"] == [0, 1, 2, 3], seconds=40)
    killed = start_index(process, "--slot", "2", **env)
    await until(lambda: len(assigned(stays)["items"]) == len(assigned(killed)["items"]) == 2)
    killed.kill()
    taking_out = process("index", "--slot", "2", "--remove", env=ONE_THREAD)
    assert await asyncio.to_thread(taking_out.wait, 60) == 0, taking_out.output()
    await until(lambda: assigned(stays)["items"] == [0, 1, 2, 3], seconds=40)
    async with feeding(settings) as feed, center(settings) as index:
        for n in range(20):
            await feed.publish(f"i{n}", f"title {n}")
        await assert_ends_with_the_last_word(feed, index)
