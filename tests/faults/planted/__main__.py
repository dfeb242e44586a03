"""`python -m tests.faults.planted --out DIR`: plant each bug, run rounds until it is found, say what was said of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from streams.settings import load_settings
from streams.stack.run import RunningStack, running_stack
from tests.faults import checks
from tests.faults.planted import BUGS
from tests.faults.processes import Starter
from tests.faults.rounds import Rounds

ROUNDS = 3
SETTLE_SECONDS = 15.0
"""What is wrong once everything is acknowledged stays wrong however long one waits."""


@dataclass
class Hunt:
    """What became of one planted bug."""

    bug: str
    rounds: int
    found: bool
    """Whether a violation says what is wrong."""
    violations: list[str]


async def hunt(stack: RunningStack, starter: Starter, folder: Path, bug: str, seed: int) -> Hunt:
    """Run rounds with one bug planted until it is found."""
    rounds = Rounds(stack, starter, folder, name=f"p{list(BUGS).index(bug)}{int(time.time()) % 10_000}", bug=bug)
    said: list[str] = []
    try:
        for number in range(1, ROUNDS + 1):
            report = await rounds.run(number, seed, (BUGS[bug].shown_by,))
            said += [*report.violations, *filter(None, [report.mended])]
            plain = [violation for violation in said if any(sign in violation for sign in BUGS[bug].signs)]
            if plain:
                return Hunt(bug, number, True, [*plain, *(other for other in said if other not in plain)])
    finally:
        await rounds.close()
    return Hunt(bug, ROUNDS, False, said)


def main() -> int:
    """Hunt all bugs, or some."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.planted", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bug", action="append", choices=sorted(BUGS))
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    checks.SETTLE_SECONDS = SETTLE_SECONDS
    work = Path(tempfile.mkdtemp(prefix="mimstream-planted-"))
    hunts = []
    with (
        running_stack(work / "stack", load_settings().stack) as stack,
        Starter(work / "processes") as starter,
        asyncio.Runner() as runner,
    ):
        for bug in options.bug or BUGS:
            one = runner.run(hunt(stack, starter, work, bug, options.seed))
            hunts.append(one)
            print(f"{bug}: {'found' if one.found else 'NOT FOUND'} after {one.rounds} rounds", file=sys.stderr)
            for violation in one.violations[:4]:
                print(f"  {violation[:300]}", file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planted.json").write_text(json.dumps([vars(one) for one in hunts], indent=2))
    shutil.rmtree(work, ignore_errors=True)
    return 0 if all(one.found for one in hunts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
