"""What breaks. Each fault strikes, says so at that moment (so that it can be measured what was under way), and heals.

What a fault takes down, it brings back as an operator or a scheduler would: the same command again. Faults that have an
expected verdict (a worker that was replaced must end with status 4, a replaced topic must be refused) report anything
else as a violation.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kafka.admin import MemberToRemove
from kafka.structs import OffsetAndMetadata, TopicPartition

from streams.broker.clients import make_admin
from streams.broker.topics import create_topics
from streams.stack.parts import PartName
from tests.faults.processes import Broken, Process
from tests.faults.scenario import Fault, shelf
from tests.faults.world import SESSION_SECONDS, World

FENCED, MISCONFIGURED = 4, 2
NOTICES_SECONDS = 60.0
"""How long a process that was replaced may take to notice and end."""


@dataclass
class Strike:
    """One fault at work."""

    world: World
    rng: random.Random
    pause: float
    """Seconds that what was taken away stays away."""
    struck: Callable[[], Awaitable[None]]
    """Call it at the moment of the fault."""
    something_under_way: Callable[[], Awaitable[None]]
    """Waits for a moment at which something is un-acknowledged; a fault that takes preparations asks for it again."""
    sending: asyncio.Lock
    """Whoever holds it, nothing is sent meanwhile."""
    violations: list[str] = field(default_factory=list)


Recipe = Callable[[Strike], Awaitable[None]]


def _kill(name: str) -> Recipe:
    async def recipe(strike: Strike) -> None:
        world = strike.world
        await world.workers[name].kill()
        await strike.struck()
        await asyncio.sleep(strike.pause)
        await world.start(name)

    return recipe


def _kill_part(part: PartName) -> Recipe:
    async def recipe(strike: Strike) -> None:
        if part != "milvus":
            await strike.struck()  # who is to tell afterwards dies with it
        await asyncio.to_thread(strike.world.stack.kill, part)
        if part == "milvus":
            await strike.struck()
        await asyncio.to_thread(strike.world.stack.wait_ready, part)

    return recipe


async def _freeze_broker(strike: Strike) -> None:
    pid = strike.world.stack.pid("kafka")
    await strike.struck()
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(strike.rng.choice((0.5, 2.0, SESSION_SECONDS + 1.5)) + strike.pause)
    finally:
        os.kill(pid, signal.SIGCONT)
    await asyncio.to_thread(strike.world.stack.wait_ready, "kafka")


async def _at_work(strike: Strike, name: str) -> Process:
    """A worker that another fault has just replaced gets to its work first: who never had a role can be no zombie."""
    if not strike.world.workers[name].said(f"{name}.ready"):
        await strike.world.ready(name)
        await strike.something_under_way()
    return strike.world.workers[name]


async def _zombie_index(strike: Strike) -> None:
    async with _asleep(strike, "index", "an index worker"):
        ends = dict(strike.world.ends["items"])
        await strike.world.run("index")
        await _caught_up(strike, "index", "items", ends)
        await asyncio.sleep(strike.pause)


async def _zombie_train(strike: Strike) -> None:
    world = strike.world
    async with _asleep(strike, "train", "a trainer"):
        world.states.append(world.folder / f"train-{len(list(world.folder.glob('train-*')))}")
        await world.run("train")
        await asyncio.sleep(strike.pause + 1.0)


@asynccontextmanager
async def _asleep(strike: Strike, name: str, what: str) -> AsyncIterator[None]:
    """A worker sleeps while it is replaced; when it has woken up, it must notice that and end."""
    sleeper = await _at_work(strike, name)
    sleeper.send(signal.SIGSTOP)
    try:
        await strike.struck()
        yield
    finally:
        sleeper.send(signal.SIGCONT)
    try:
        status = await sleeper.ended(NOTICES_SECONDS)
    except Broken:
        strike.violations.append(f"{what} that woke up after it was replaced goes on as if nothing had happened")
        await sleeper.kill()
        return
    if status != FENCED:
        strike.violations.append(f"{what} that woke up after it was replaced ended with {status}, not 4")


async def _full_disk(strike: Strike) -> None:
    world, filler = strike.world, strike.world.models / "filler"
    trainer = world.workers["train"]
    if world.disk_is_small:
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65_536)
                file.flush()
    else:
        # not allowed to mount a small file system: let no file of the trainer grow beyond a few bytes instead
        limits = resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (64, limits[1]))
    await strike.struck()
    await asyncio.sleep(2.0 + 2 * strike.pause)
    if world.disk_is_small:
        filler.unlink(missing_ok=True)
    elif trainer.status is None:
        resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    if trainer.status is not None:
        # giving up over a full disk is allowed, as long as starting again goes on where it stood
        await world.start("train")


async def _clock_jumps(strike: Strike) -> None:
    world = strike.world
    clock_file(world).write_text(f"{strike.rng.choice((-1, 1)) * strike.rng.randrange(120, 3_000):+d}\n")
    await strike.struck()
    await asyncio.sleep(1.0 + strike.pause)


def clock_file(world: World) -> Path:
    """What the processes under a false clock follow."""
    return world.folder / "clock"


def false_clock_of(fault: Fault) -> str | None:
    """The worker that this fault wants under a false clock, to be restarted before the round begins."""
    return fault.removeprefix("clock jump ") if fault.startswith("clock jump ") else None


async def _joins_and_leaves(strike: Strike) -> None:
    world = strike.world
    async with strike.sending:
        newcomer = await world.run("index 1")
    await strike.something_under_way()
    if strike.rng.random() < 0.5:
        await newcomer.kill()
        await strike.struck()
    else:
        await strike.struck()
        if (status := await newcomer.stop()) != 0:
            strike.violations.append(f"an index worker that was told to leave ended with {status}")
    del world.workers["index 1"]


async def _deliver_again(strike: Strike) -> None:
    world = strike.world
    worker = world.workers["index"]
    await worker.kill()
    await strike.struck()
    committed = await world.committed("index", "items")
    topic, group = world.settings.topics.full_name("items"), world.settings.topics.group("index")
    back = {p: max(0, offset - strike.rng.randrange(40)) for p, offset in committed.items()}

    def set_back() -> None:
        with closing(make_admin(world.settings.kafka)) as admin:
            admin.remove_group_members(group, [MemberToRemove(group_instance_id="index-0")])
            wanted = {TopicPartition(topic, p): OffsetAndMetadata(offset, "", None) for p, offset in back.items()}
            admin.alter_group_offsets(group, wanted)

    await asyncio.to_thread(set_back)
    await world.start("index")


async def _behaviours_again(strike: Strike) -> None:
    world = strike.world
    async with strike.sending:
        await strike.struck()
        await _create_again(world, "behaviours")
        for name in ("record", "train"):
            worker = world.workers[name]
            try:
                status = await worker.ended(120.0)
            except Broken:
                if name == "record":
                    strike.violations.append("the recorder did not notice that its topic was created again")
                await worker.kill()
                continue
            if status != MISCONFIGURED:
                strike.violations.append(f"{name} ended with {status} when its topic was created again, not 2")
        await world.forget_behaviours()
        await world.start("record", more=("--rebuild",))
        await world.start("train")
        await world.ready("record")
        await world.workers["serve"].stop()  # its models lie elsewhere now
        await world.run("serve")


async def _items_again(strike: Strike) -> None:
    world = strike.world
    async with strike.sending:
        await strike.struck()
        await _caught_up(strike, "index", "items", dict(world.ends["items"]))
        await world.read_logs()
        await world.workers["index"].kill()
        await _create_again(world, "items")
        await world.forget_items()
        await world.run("index")
        await world.send(shelf())  # what a new log does not hold, a repair removes


async def _create_again(world: World, name: str) -> None:
    full = world.settings.topics.full_name(name)  # type: ignore[arg-type]

    def delete() -> None:
        with closing(make_admin(world.settings.kafka)) as admin:
            admin.delete_topics([full])

    await asyncio.to_thread(delete)
    for _ in range(100):
        if full in await asyncio.to_thread(create_topics, world.settings.kafka, world.settings.topics):
            break
        await asyncio.sleep(0.2)
    else:
        raise Broken(f"topic {full} could not be created again")
    await world.connect()


async def _caught_up(strike: Strike, role: str, topic: str, ends: dict[int, int]) -> None:
    for _ in range(3_000):
        try:
            committed = await strike.world.committed(role, topic)
        except Exception:  # the other fault of this round may be on: ask again
            committed = {}
        if all(committed.get(p, 0) >= end for p, end in ends.items()):
            return
        await asyncio.sleep(0.1)
    strike.violations.append(f"{role} did not get to where {topic} ended at the fault within five minutes")


RECIPES: dict[Fault, Recipe] = {
    "kill index": _kill("index"),
    "kill record": _kill("record"),
    "kill train": _kill("train"),
    "kill serve": _kill("serve"),
    "kill broker": _kill_part("kafka"),
    "freeze broker": _freeze_broker,
    "zombie index": _zombie_index,
    "zombie train": _zombie_train,
    "kill valkey": _kill_part("valkey"),
    "kill milvus": _kill_part("milvus"),
    "full disk": _full_disk,
    "clock jump index": _clock_jumps,
    "clock jump record": _clock_jumps,
    "clock jump train": _clock_jumps,
    "a worker joins and leaves": _joins_and_leaves,
    "deliver again": _deliver_again,
    "behaviours created again": _behaviours_again,
    "items created again": _items_again,
}
