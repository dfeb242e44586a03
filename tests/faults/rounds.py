"""Runs rounds: sends what a round plans, lets its faults strike, waits until all is quiet, looks at every invariant."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from encoders.base import Encoder
from encoders.config import EncoderConfig
from encoders.loading import load_encoder
from streams.settings import environment_of
from streams.stack.run import RunningStack
from tests.faults import checks
from tests.faults.checks import FEW, QUIET_SECONDS, Findings, settled
from tests.faults.faults import RECIPES, Strike, clock_file, false_clock_of
from tests.faults.oracle import expected_behaviours, expected_items
from tests.faults.processes import Broken, Starter
from tests.faults.reference import Reference
from tests.faults.release_checks import PointerWatch, look_at_releases
from tests.faults.scenario import FAULTS, ROUND_SECONDS, START, USERS, Fault, Plan, plan_round, shelf
from tests.faults.small_encoder import small_encoder
from tests.faults.world import World

ROUNDS_PER_WORLD = 10
"""Then the next ones get new topics, so that what a trainer replays after a kill stays small."""
GAP_SECONDS = 0.25
"""Between two bursts."""
HOT_SECONDS = 3.0
"""How long a fault waits for a moment at which something is un-acknowledged."""


@dataclass
class RoundReport:
    """What a round did and found."""

    number: int
    seed: int
    faults: list[str]
    violations: list[str] = field(default_factory=list)
    unacknowledged: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each fault, at its moment, by role: records acknowledged to the producer and not yet by the role."""
    mended: str = ""
    """What a zombie wrote before it noticed, if it did: allowed, because `center verify --repair` mends it."""
    figures: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    settled_seconds: float = 0.0
    """From the last record sent to when everything was as it should be."""
    world: str = ""

    @property
    def hot(self) -> bool:
        """Whether each fault met un-acknowledged work of the roles that it concerns."""
        return all(any(self.unacknowledged.get(fault, {}).values()) for fault in self.faults)

    def as_json(self) -> dict[str, Any]:
        """For a line of the results."""
        return asdict(self) | {"hot": self.hot}


class Rounds:
    """Rounds on one stack, several to a world."""

    def __init__(
        self, stack: RunningStack, starter: Starter, folder: Path, *, name: str, bug: str | None = None
    ) -> None:
        self._stack = stack
        self._starter = starter
        self._folder = folder
        self._name = name
        self._bug = bug
        self._bundle = small_encoder(folder / "encoder")
        self._encoder: Encoder = load_encoder(EncoderConfig(bundle=str(self._bundle), num_threads=1))
        self._worlds = 0
        self._world: World | None = None
        self._reference: Reference | None = None
        self._lives = 0
        self._left = 0

    async def run(self, number: int, seed: int, faults: Sequence[Fault] | None = None) -> RoundReport:
        """Run one round. After a violation the next round gets a world of its own."""
        plan = plan_round(number, seed, faults)
        report = RoundReport(number, seed, list(plan.faults))
        started = time.monotonic()
        try:
            world = await self._a_world(plan)
            report.world = world.folder.name
            await _Round(world, plan, self._reference_of(world), self._encoder, report).run()
        except Broken as error:
            report.violations.append(f"the round could not go on: {error}")
        report.seconds = round(time.monotonic() - started, 1)
        self._left -= 1
        if report.violations:
            self._left = 0
        return report

    async def close(self) -> None:
        """End the world that is open."""
        world, self._world = self._world, None
        if world is not None:
            await world.close()

    async def _a_world(self, plan: Plan) -> World:
        if self._world is not None and self._left > 0:
            return self._world
        await self.close()
        self._worlds += 1
        name = f"{self._name}w{plan.number}"
        folder = self._folder / name
        folder.mkdir(parents=True)
        world = World(self._stack, self._starter, self._bundle, folder, name)
        world.bug = self._bug
        self._world, self._left, self._lives = world, ROUNDS_PER_WORLD, 0
        self._reference = Reference(world.settings.trainer)
        await world.open(("index", "record", "train"))
        await world.send(shelf())
        findings = await settled(lambda: checks.look_at_acknowledgements(world), QUIET_SECONDS)
        if findings.violations:
            raise Broken(f"the first items were not indexed: {findings.violations}")
        await world.start("serve")
        await world.workers["serve"].says("serve.ready")
        return world

    def _reference_of(self, world: World) -> Any:
        def current() -> Reference:
            if self._reference is None or self._lives != world.lives:
                self._lives, self._reference = world.lives, Reference(world.settings.trainer)
            return self._reference

        return current


class _Round:
    def __init__(self, world: World, plan: Plan, reference: Any, encoder: Encoder, report: RoundReport) -> None:
        self._world = world
        self._plan = plan
        self._reference = reference
        self._encoder = encoder
        self._report = report
        self._begun = [asyncio.Event() for _ in plan.bursts]
        self._sending = asyncio.Lock()
        self._locks: dict[str, asyncio.Lock] = {}

    async def run(self) -> None:
        report, plan, world = self._report, self._plan, self._world
        false_clocks = [name for fault in plan.faults if (name := false_clock_of(fault))]
        for name in false_clocks:
            clock_file(world).write_text("+0\n")
            await world.workers[name].stop()
            await world.run(name, clock=clock_file(world))
        watch = PointerWatch(world)
        watching = asyncio.gather(watch.run(), world.look_after())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_all())
                for number, fault in enumerate(plan.faults):
                    tasks.create_task(self._strike(number, fault))
        except* Broken as errors:
            report.violations += [f"the round could not go on: {error}" for error in errors.exceptions]
        sent = time.monotonic()
        await world.send(plan.fillers)
        await self._look()
        report.settled_seconds = round(time.monotonic() - sent, 1)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        if "behaviours created again" not in plan.faults:
            report.violations += watch.findings.violations[:3]
        for name in false_clocks:
            await world.workers[name].stop()
            await world.run(name)

    async def _send_all(self) -> None:
        for number, burst in enumerate(self._plan.bursts):
            async with self._sending:
                self._begun[number].set()
                await self._world.send(burst)
            await asyncio.sleep(GAP_SECONDS)

    async def _strike(self, number: int, fault: Fault) -> None:
        world, plan, report = self._world, self._plan, self._report
        await self._begun[plan.fault_bursts[number]].wait()
        concerned, subject = FAULTS[fault].concerned, FAULTS[fault].subject
        async with self._locks.setdefault(subject or fault, asyncio.Lock()):

            async def something_under_way() -> None:
                hot_by = time.monotonic() + HOT_SECONDS
                while time.monotonic() < hot_by and not any((await world.unacknowledged(concerned)).values()):
                    await asyncio.sleep(0.005)
                await asyncio.sleep(plan.delays[number])

            await something_under_way()

            async def struck() -> None:
                report.unacknowledged[fault] = await world.unacknowledged(concerned)

            rng = random.Random(f"{plan.seed}/{number}")
            strike = Strike(world, rng, plan.pauses[number], struck, something_under_way, self._sending)
            await RECIPES[fault](strike)
            report.violations += strike.violations

    async def _mend(self) -> None:
        """What a zombie wrote in its last moment is mended by `center verify --repair`, and counted."""
        world, report = self._world, self._report
        arguments = ("center", "verify", "--repair", "--json")
        verifying = world.starter.start("center", arguments, environment_of(world.values))
        status = await verifying.ended(QUIET_SECONDS)
        said = verifying.output()
        try:
            answer, _ = json.JSONDecoder().raw_decode(said[said.index("\n{\n") + 1 :] if said[:2] != "{\n" else said)
        except ValueError:
            report.violations.append(f"center verify --repair ended with {status}: {said[-600:]}")
            return
        if status != 0 or answer["left"]:
            report.violations.append(f"center verify --repair left {answer['left']} faults, status {status}")
        world.items_before.clear()  # items that only a log before this one held are gone now
        if answer["mended"]:
            shown = [f"{one['item_id']} {one['fault']}" for one in answer["examples"][:FEW]]
            report.mended = f"center verify mended {answer['mended']} items after a zombie, such as {', '.join(shown)}"

    async def _look(self) -> None:
        world, report = self._world, self._report
        base = int((START + timedelta(seconds=self._plan.number * ROUND_SECONDS)).timestamp())

        async def look() -> Findings:
            await world.read_logs()
            items = expected_items(world.logs["items"].records)
            behaviours = expected_behaviours(world.logs["behaviours"].records)
            reference: Reference = self._reference()
            reference.follow(world.logs["embeddings"], world.logs["queries"], world.logs["behaviours"])
            together = Findings()
            for found in (
                checks.look_at_log(world),
                await checks.look_at_acknowledgements(world),
                checks.look_at_training(world, behaviours, reference, until=base + 400),
                await checks.look_at_histories(world, behaviours),
                await checks.look_at_center(world, items, self._encoder),
                checks.look_at_announcements(world, items),
                checks.look_at_queries(world, behaviours, self._encoder),
                checks.look_at_letters(world, items, behaviours),
                look_at_releases(world, reference),
                await checks.look_at_serving(world, items, USERS),
            ):
                together.violations += found.violations
                together.figures |= found.figures
            return together

        quiet = await settled(lambda: checks.look_at_acknowledgements(world), QUIET_SECONDS)
        if "zombie index" in self._plan.faults and not quiet.violations:
            await self._mend()
        findings = quiet if quiet.violations else await settled(look)
        report.violations += findings.violations
        report.figures = findings.figures | {"started_again": world.started_again}
        for name, worker in list(world.workers.items()):
            if worker.status is not None:
                said = worker.output()[-600:]
                report.violations.append(f"{name} ended by itself with status {worker.status}: {said}")
