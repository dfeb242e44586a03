"""Memory of a trainer over a long run: invented items are published, taken for a while and deleted, without Kafka.

    nice python -m tests.benchmarks.long_run [--events 10000000] [--folder FOLDER] [--growth 0.05]
        [--results RESULTS] [--leak]

The records go through `Feed`, `TrainerThread` and `OnlineTrainer` as `mimstream train` has them; reading from Kafka,
releases and writing of files are left out. Vectors, batches and network are small (`CONFIG`), so that training is a
minor part of the time. Every 100,000 events the resident memory and the size of each bounded structure are sampled. At
each twentieth of the run the whole state goes to FOLDER, and what was sampled so far to `long_run.json` and
`long_run.png` in RESULTS; a run that was ended goes on from there, in a new process. A million events take two minutes
of one core.

Exit status 1 if the mean of resident memory grows by more than GROWTH from the second third of the run to the last one,
or that of a structure by more than a fifth (without a bound it would be two thirds) and beyond what it may hold.
`--leak` adds a structure that grows, to see that.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import sys
import time
from asyncio import Event
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from schemas.behaviours import Behaviour, BehaviourKind
from schemas.items import ItemEmbedding, SourceOffset
from streams.stores.artifacts.checkpoints import pack_arrays, unpack_arrays
from streams.training.feed import Feed
from streams.training.trainer_thread import TrainerThread
from streams.training.vector_records import EmbeddingRecord
from trainer.networks.config import CiUBMConfig
from trainer.online.config import TrainerConfig
from trainer.online.embedding_wait import EmbeddingWait
from trainer.online.trainer import OnlineTrainer
from trainer.samples.partition_merge import Entry, PartitionMerge
from trainer.state import State

RESULTS = Path(__file__).parent / "results"
START, DIM, PARTITIONS, SAMPLE_EVERY = 1_700_000_000, 16, 4, 100_000
ITEM_EVERY = 10
"""Events between two publications: a million items in ten million events."""
LIFE = 20_000
"""Items that are in the shop at a time."""
EVENTS_PER_SECOND = 200
"""In event time: the run lasts 14 hours of it."""
USERS = 60_000
CONFIG = TrainerConfig(
    batch_rows=4096,
    history_length=10,
    max_users=20_000,
    duplicate_horizon_seconds=3600,
    correction_seconds=600,
    cart_correction_seconds=1200,
    purchase_correction_seconds=3600,
    correction_megabytes=64,
    item_megabytes=40,
    remembered_items=50_000,
    space_negatives=64,
    time_negatives=64,
    model=CiUBMConfig(id_width=4, id_rows=4096, content_width=8, hidden=(16,), attention_hidden=8, dropout=0.0),
)
_VECTORS = np.random.default_rng(0).normal(size=(997, DIM))
_VECTORS = (_VECTORS / np.linalg.norm(_VECTORS, axis=1, keepdims=True)).astype("<f4")
_STRUCTURE_GROWTH, _FEW = 0.2, 1000
_BOUNDS = {"waits for vectors": 100_000}
"""Entries up to which a structure may fill at any pace: of items that are gone when a behaviour names them."""
"""Growth of one structure that is allowed, as it may rise and fall, and the size below which none is looked at."""
_KINDS = (BehaviourKind.CLICK, BehaviourKind.CLICK, BehaviourKind.CART, BehaviourKind.PURCHASE)


class InventedRecords:
    """Both topics, made as they are asked for; what comes depends on the number of the event alone."""

    def __init__(self, events: int) -> None:
        self.events, self.made = events, 0
        self.bounded, self.starts = False, dict.fromkeys(range(PARTITIONS), 0)
        self.beginnings, self.partitions = self.starts, list(range(PARTITIONS))
        self.embedding_offsets, self.query_offsets = {0: 0}, dict[int, int]()
        self.embeddings_are_current, self.waits_for_silence = True, False
        self._offsets = [0] * PARTITIONS
        self._merge = PartitionMerge(range(PARTITIONS), room_per_partition=5_000)
        self._vectors: list[EmbeddingRecord] = []
        self._published = 0

    def make(self, count: int) -> None:
        """Add the next events, a multiple of five, with the publications and deletions before them."""
        entries: list[list[Entry]] = [[] for _ in range(PARTITIONS)]
        for n in range(self.made, min(self.made + count, self.events)):
            while self._published <= n // ITEM_EVERY + 1:
                self._publish(self._published, n)
                self._published += 1
            if n % 5 == 0:
                group = list(_events(n))
                partition = int(group[0].user_id) % PARTITIONS
            event = group[n % 5]
            at = event.occurred_at.timestamp()
            entries[partition].append(Entry(partition, self._offsets[partition], at, event, at))
            self._offsets[partition] += 1
        self.made = min(self.made + count, self.events)
        for partition, new in enumerate(entries):
            self._merge.add(partition, new)
        self._merge.set_exhausted(dict.fromkeys(range(PARTITIONS), math.inf))

    def _publish(self, item: int, n: int) -> None:
        self._vectors.append(EmbeddingRecord(str(item), _vector(item, n)))
        if item >= LIFE:
            self._vectors.append(EmbeddingRecord(str(item - LIFE), None))

    @property
    def has_embeddings(self) -> bool:
        return bool(self._vectors)

    def next_embeddings(self) -> list[EmbeddingRecord]:
        vectors, self._vectors = self._vectors, []
        return vectors

    def next_behaviours(self, most: int, *, only: Collection[int] | None = None) -> list[Entry]:
        return self._merge.pop(most, only=only)

    def newly_idle(self, *, except_for: Iterable[int] = ()) -> list[int]:
        return []

    @property
    def all_handed_out(self) -> bool:
        return self.made == self.events and len(self._merge.empty_and_exhausted()) == PARTITIONS

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands once all that was made was handed out."""
        return {"made": self.made, "offsets": self._offsets, "published": self._published}

    def go_to(self, place: dict[str, Any]) -> None:
        """Go on from `place`."""
        self.made, self._offsets, self._published = place["made"], place["offsets"], place["published"]


def _events(first: int) -> Iterator[Behaviour]:
    """Four exposures of a user, then a take of one of them, now and then late."""
    rng = random.Random(first)
    user, newest = str(rng.randrange(USERS)), first // ITEM_EVERY
    items = [str(max(newest - min(int(rng.expovariate(1 / 3000)), LIFE - 1), 0)) for _ in range(4)]
    at, shown = START + first / EVENTS_PER_SECOND, datetime.fromtimestamp(START + first / EVENTS_PER_SECOND, UTC)
    for n, item in enumerate(items):
        yield Behaviour.model_construct(
            event_id=f"e{first + n}", kind=BehaviourKind.EXPOSURE, user_id=user, item_id=item, occurred_at=shown
        )
    n, kind = rng.randrange(4), rng.choice(_KINDS)
    late = 0 if kind is BehaviourKind.CLICK else 40
    yield Behaviour.model_construct(
        event_id=f"e{first + 4}",
        kind=kind,
        user_id=user,
        item_id=items[n],
        occurred_at=datetime.fromtimestamp(at + late, UTC),
        exposure_id=f"e{first + n}",
    )


def _vector(item: int, n: int) -> ItemEmbedding:
    return ItemEmbedding.model_construct(
        item_id=str(item),
        encoder_version="invented",
        vector=_VECTORS[item % len(_VECTORS)].tobytes(),
        dim=DIM,
        content_hash=f"{item:064x}",
        published_at=datetime.fromtimestamp(START + n / EVENTS_PER_SECOND, UTC),
        source=SourceOffset(partition=0, offset=item),
    )


def sizes(trainer: OnlineTrainer, thread: TrainerThread) -> dict[str, int]:
    """How much each structure holds, as ARCHITECTURE.md's table lists them."""
    intake, state = trainer.intake, trainer.catalogue
    inside = vars(intake)
    join = vars(inside["_join"])
    seen = [partition.seen for partition in vars(intake.window)["_partitions"].values()]
    offsets = vars(intake.offsets)
    return {
        "pending bytes": intake.pending_bytes,
        "queued takes": len(inside["_takes"]),
        "histories": len(join["_histories"]),
        "correctable rows": sum(1 for _ in join["_correctable"]),
        "event ids": sum(len(one) for one in seen),
        "items with a row": len(state),
        "items with a number": state.named,
        "numbers, with retired ones": len(vars(state)["_row_of"]),
        "places of the matrix of vectors": len(vars(state)["_vectors"]),
        "counts of takes": len(vars(trainer)["_take_counts"]),
        "remembered items": len(list(inside["_deleted"])) + len(list(inside["_timed_out"])),
        "waits for vectors": len(thread.waits.snapshot()["since"]),
        "offsets in hand": sum(
            len(part) for name in ("_open", "_untrained", "_trained_ahead") for part in offsets[name].values()
        ),
        "rows of the journal": trainer.journal.segment().rows,
    }


def resident_megabytes() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Run:
    """One run; `samples` of earlier processes come with its place."""

    def __init__(self, events: int, folder: Path, *, leak: bool) -> None:
        self.reads = InventedRecords(events)
        self.thread = TrainerThread(
            self.reads,  # type: ignore[arg-type]
            lambda version, dim, parts: OnlineTrainer(CONFIG, encoder_version=version, dim=dim, partitions=parts),
            waits=EmbeddingWait(timeout_seconds=60, max_waits=_BOUNDS["waits for vectors"]),
        )
        self._feed = Feed(self.reads, self.thread.waits, clock=time.monotonic)  # type: ignore[arg-type]
        self._folder, self._leak = folder, [""] if leak else None
        self._missing: frozenset[str] = frozenset()
        self.samples: list[dict[str, Any]] = []
        self._began, self._before = time.monotonic(), 0.0

    def go_on(self) -> None:
        """Take the place that an earlier process left, if there is one."""
        kept = self._folder / "state.bin"
        if not kept.exists():
            return
        values = json.loads((self._folder / "values.json").read_text())
        self.reads.go_to(values.pop("place"))
        self.samples, self._before = values.pop("samples"), values.pop("seconds")
        state = State(unpack_arrays(kept.read_bytes()), values)
        self.thread.restore(state, encoder_version="invented", dim=DIM)
        print(f"goes on at {self.reads.made:,} events", flush=True)

    def keep(self) -> None:
        """Write everything that `go_on` needs."""
        state = self.thread.snapshot()
        self._folder.mkdir(parents=True, exist_ok=True)
        values = state.values | {"place": self.reads.place, "samples": self.samples, "seconds": self.seconds}
        (self._folder / "new.bin").write_bytes(pack_arrays(state.arrays))
        (self._folder / "values.json").write_text(json.dumps(values))
        (self._folder / "new.bin").replace(self._folder / "state.bin")

    @property
    def seconds(self) -> float:
        """Of computing so far."""
        return self._before + time.monotonic() - self._began

    def run(self) -> Iterator[None]:
        """To the end, with a stop wherever the state was kept."""
        stop, keep_every = Event(), max(self.reads.events // 20, SAMPLE_EVERY)
        while not self.reads.all_handed_out:
            self.reads.make(2_000)
            if self.thread.trainer is None:
                self.thread.put_embeddings()
            trainer = self.thread.trainer
            assert trainer is not None
            while not (batch := self._feed.next(trainer, self._missing)).empty:
                result = self.thread.run_once(batch, stop=stop, releases=True)
                self._missing = result.missing
                if trainer.release_due():
                    trainer.candidate()
                    trainer.begin_next()
                if self._leak is not None:
                    self._leak.extend(entry.behaviour.event_id * 9 for entry in batch.entries if entry.behaviour)
            if self.reads.made % SAMPLE_EVERY == 0 and self.reads.made not in (s["events"] for s in self.samples[-1:]):
                self._sample(trainer)
            if self.reads.made % keep_every == 0:
                self.keep()
                yield

    def _sample(self, trainer: OnlineTrainer) -> None:
        gc.collect()
        held = sizes(trainer, self.thread)
        if self._leak is not None:
            held["planted"] = len(self._leak)
        line = {"events": self.reads.made, "seconds": round(self.seconds, 1), "rows": trainer.progress.rows}
        self.samples.append(line | {"resident_megabytes": round(resident_megabytes(), 1), "sizes": held})
        print(json.dumps(self.samples[-1]), flush=True)


def growth(samples: list[dict[str, Any]]) -> dict[str, float]:
    """For resident memory and each structure: its mean in the last third of the run over that in the third before."""
    third = max(len(samples) // 3, 1)
    middle, last = samples[third : 2 * third], samples[2 * third :]
    found = {"resident_megabytes": _ratio([[s["resident_megabytes"] for s in part] for part in (middle, last)])}
    for name in samples[-1]["sizes"]:
        found[name] = _ratio([[s["sizes"][name] for s in part] for part in (middle, last)])
    return found


def _ratio(parts: list[list[float]]) -> float:
    middle, last = (fmean(part or [0.0]) for part in parts)
    return round(last / middle - 1, 4) if middle else math.inf if last else 0.0


def draw(samples: list[dict[str, Any]], file: Path) -> None:
    """Resident memory, and each structure as a share of its largest size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True)
    events = [sample["events"] / 1e6 for sample in samples]
    above.plot(events, [sample["resident_megabytes"] for sample in samples])
    above.set(ylabel="resident memory (MB)", ylim=(0, None))
    for name in samples[-1]["sizes"]:
        values = [sample["sizes"].get(name, 0) for sample in samples]
        if largest := max(values):
            below.plot(events, [value / largest for value in values], label=f"{name} (most {largest:,})", lw=0.8)
    below.set(xlabel="million events", ylabel="share of its largest size", ylim=(0, 1.05))
    below.legend(fontsize=6, ncol=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def arguments(given: list[str]) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("long_run_state"))
    parser.add_argument("--growth", type=float, default=0.05)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--leak", action="store_true")
    return parser.parse_args(given)


def write(run: Run, args: argparse.Namespace) -> dict[str, float]:
    """Write what was sampled; returns what grew by more than it may."""
    grown = growth(run.samples)
    allowed = {name: args.growth if name == "resident_megabytes" else _STRUCTURE_GROWTH for name in grown}
    largest = {name: max(sample["sizes"].get(name, 0) for sample in run.samples) for name in run.samples[-1]["sizes"]}
    too_much = {
        name: share
        for name, share in grown.items()
        if share > allowed[name] and largest.get(name, math.inf) > _BOUNDS.get(name, _FEW)
    }
    report = {
        "events": run.reads.made,
        "items": run.reads.made // ITEM_EVERY,
        "seconds": round(run.seconds),
        "allowed_growth": args.growth,
        "growth": grown,
        "grew": too_much,
        "config": CONFIG.model_dump(mode="json"),
        "samples": run.samples,
    }
    (args.results / "long_run.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(run.samples, args.results / "long_run.png")
    return too_much


def main(args: argparse.Namespace) -> int:
    """Run, write, and say what grew; 1 if anything did."""
    torch.set_num_threads(1)
    run = Run(args.events, args.folder, leak=args.leak)
    run.go_on()
    for _ in run.run():
        write(run, args)
    too_much = write(run, args)
    print(json.dumps({"grew": too_much}))
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
