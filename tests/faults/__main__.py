"""`python -m tests.faults --rounds N --seed S --out DIR`: many rounds, resumed where they stopped."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from streams.settings import load_settings
from streams.stack.run import running_stack
from tests.faults.processes import Starter
from tests.faults.report import read_rounds, write_report
from tests.faults.rounds import Rounds
from tests.faults.scenario import FAULTS


def main() -> int:
    """Run what is left of the rounds, a line of JSON for each, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="rounds in all, those of earlier runs included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="rounds.jsonl, report.md and report.png go here")
    parser.add_argument(
        "--work", type=Path, help="stack, logs and models; kept after a violation (default: a temporary folder)"
    )
    parser.add_argument("--fault", action="append", choices=sorted(FAULTS), help="only these, in every round")
    parser.add_argument("--minutes", type=float, help="begin no round after this time")
    parser.add_argument("--bug", help="plant this bug in the processes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # a broker that is away is what is wanted here
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    lines = options.out / "rounds.jsonl"
    done = {line["number"] for line in read_rounds(lines)}
    left = [number for number in range(1, options.rounds + 1) if number not in done]
    work = Path(tempfile.mkdtemp(prefix="mimstream-faults-", dir=options.work))
    violated = 0
    try:
        if left:
            with running_stack(work / "stack", load_settings().stack) as stack, Starter(work / "processes") as starter:
                rounds = Rounds(stack, starter, work, name=f"f{int(time.time()) % 100_000}", bug=options.bug)
                with asyncio.Runner() as runner:
                    violated = runner.run(_rounds(rounds, left, lines, options))
    finally:
        write_report(options.out, f"python -m tests.faults --rounds {options.rounds} --seed {options.seed}")
    if not violated:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if violated else 0


async def _rounds(rounds: Rounds, left: list[int], lines: Path, options: argparse.Namespace) -> int:
    violated, started = 0, time.monotonic()
    try:
        for number in left:
            if options.minutes and time.monotonic() - started > 60 * options.minutes:
                break
            report = await rounds.run(number, options.seed, options.fault)
            with lines.open("a") as file:
                file.write(json.dumps(report.as_json()) + "\n")
            violated += bool(report.violations)
            print(
                f"round {number}/{options.rounds}: {', '.join(report.faults)}; {report.seconds:.0f} s, "
                f"un-acknowledged {report.unacknowledged}, {len(report.violations)} violations",
                file=sys.stderr,
                flush=True,
            )
            for violation in report.violations:
                print(f"  {violation}", file=sys.stderr, flush=True)
    finally:
        await rounds.close()
    return violated


if __name__ == "__main__":
    raise SystemExit(main())
