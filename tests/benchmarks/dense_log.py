"""Memory and speed of the trainer's intake at 20,000 events a second of event time, with default settings.

    nice python -m tests.benchmarks.dense_log [--seconds 140] [--rate 20000]

Rows are taken as soon as they are ready, as if training cost nothing: what is held is what lateness and attribution
make every event wait. Writes `dense_log.json` beside this module's other results. Exit status 1 if the estimate that
the trainer goes by exceeds `MIM_TRAINER__PENDING_MEGABYTES`. Resident memory has more in it: histories, impressions
that a late take can correct, event ids.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

from schemas.behaviours import Behaviour
from tests.benchmarks.long_run import resident_megabytes
from trainer.online.config import TrainerConfig
from trainer.online.intake import EventIntake
from trainer.samples.catalogue import Catalogue

RESULTS = Path(__file__).parent / "results" / "dense_log.json"
PARTITIONS, START, USERS, ITEMS = 8, 1_700_000_000, 200_000, 50_000


def record(n: int, rate: int) -> str:
    """A record of the click log: one in ten is a take."""
    kind, user, item = (
        ("click" if n % 10 == 9 else "exposure"),
        n // 10 % USERS,
        (n * 7919 - n % 10 // 9 * 7919) % ITEMS,
    )
    at = START + n / rate
    return (
        f'{{"event_id":"01HF{n:022d}","kind":"{kind}","user_id":"user-{user}","item_id":"item-{item}",'
        f'"occurred_at":{at:.3f}}}'
    )


def main(seconds: int, rate: int) -> int:
    """Read so many seconds, and say what was held."""
    config = TrainerConfig()
    intake = EventIntake(config, Catalogue(8), range(PARTITIONS))
    for item in range(ITEMS):
        intake.item_deleted(f"item-{item}")  # no row waits for a vector
    gc.collect()
    gc.freeze()
    empty, began = resident_megabytes(), time.process_time()
    estimated = held = rows = pending = 0
    lines = []
    for second in range(seconds):
        for n in range(second * rate, (second + 1) * rate):
            behaviour = Behaviour.model_validate_json(record(n, rate))
            intake.observe(n // 10 % PARTITIONS, n, behaviour, written_at=behaviour.occurred_at.timestamp())
        estimated, pending = max(estimated, intake.pending_bytes), max(pending, intake.pending)
        intake.advance()
        while batch := intake.next_batch():
            intake.takes_until(batch[-1].second)
            intake.trained(batch)
            rows += len(batch)
            intake.advance()
        held = max(held, resident_megabytes() - empty)
        if second % 10 == 9:
            used = time.process_time() - began
            line = {"second": second + 1, "pending": intake.pending, "events_per_cpu_second": round(n / used)}
            line |= {"estimated_megabytes": round(intake.pending_bytes / 1e6)}
            lines.append(line | {"resident_megabytes": round(resident_megabytes() - empty)})
            print(json.dumps(lines[-1]), flush=True)
    report = {
        "events": seconds * rate,
        "events_per_second_of_event_time": rate,
        "rows": rows,
        "late": intake.counts.late,
        "most_pending": pending,
        "most_estimated_megabytes": round(estimated / 1e6),
        "allowed_megabytes": config.pending_megabytes,
        "most_resident_megabytes": round(held),
        "events_per_cpu_second": round(seconds * rate / (time.process_time() - began)),
        "course": lines,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return int(estimated > 1e6 * config.pending_megabytes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=140)
    parser.add_argument("--rate", type=int, default=20_000)
    sys.exit(main(**vars(parser.parse_args())))
