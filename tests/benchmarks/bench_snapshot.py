"""What a snapshot of a large trainer costs: all of it, and after a share of it has changed.

python tests/benchmarks/bench_snapshot.py --items 1000000 --users 1000000 [--changed 0.01] [--rounds 5] [--json FILE]

Builds a trainer of the default configuration with so many items (vectors of 128 numbers) and users (histories of 5 to
50 takes), each with a take that features count, without a broker: the parts are filled through their own verbs. Then
it writes snapshots as `mimstream train` does, into a folder beside the others' temporary files. Before each of them the
given share of users takes an item, and of items gets a new vector, all drawn uniformly, which is the worst case: real
logs name some more often.

Printed are the milliseconds for which the trainer's thread stands still (and how many of them it computed, on a
machine that others use too), the seconds until the snapshot is the
one to resume from, the bytes of its files, and the largest memory of the process beside that before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from schemas.behaviours import Behaviour, BehaviourKind  # noqa: E402
from schemas.items import ItemEmbedding  # noqa: E402
from streams.stores.artifacts.artifact_store import FolderArtifactStore  # noqa: E402
from streams.stores.artifacts.checkpoints import CheckpointMeta, CheckpointStore  # noqa: E402
from trainer.features.take_columns import TakeColumns  # noqa: E402
from trainer.online.config import TrainerConfig  # noqa: E402
from trainer.online.trainer import OnlineTrainer  # noqa: E402
from trainer.samples.id_hashes import hash_columns  # noqa: E402
from trainer.samples.rows import Take  # noqa: E402
from trainer.samples.user_history import UserHistory  # noqa: E402
from trainer.state import State  # noqa: E402

DIM, VERSION = 128, "bench.1"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class World:
    """A trainer, and changes to it."""

    def __init__(self, items: int, users: int, seed: int = 0) -> None:
        self.items, self.users = items, users
        self.rng = np.random.default_rng(seed)
        config = TrainerConfig(max_users=users)
        self.trainer = OnlineTrainer(config, encoder_version=VERSION, dim=DIM, partitions=[0])
        self.second = int(NOW.timestamp())
        self.takes = 0

    def fill(self) -> None:
        """All items with a vector and a number, all users with a history; a day of learning is not simulated."""
        catalogue, join = self.trainer.catalogue, self.trainer.intake._join
        for item in range(self.items):
            self.put(item)
            catalogue.number(f"item-{item}")
        lengths = self.rng.integers(5, 51, self.users)
        for user, length in enumerate(lengths.tolist()):
            taken = tuple(dict.fromkeys(self.rng.integers(1, self.items + 1, length).tolist()))  # each item once
            history = UserHistory(f"user-{user}", taken, (self.second,) * len(taken), user)
            join._histories[history.user] = join._history_rows.add(history)
        join._take_number = self.users
        size = max(self.items, self.users)
        self.count(self.rng.permutation(size) % self.users, 1 + self.rng.permutation(size) % self.items)
        self.learn(1_000)

    def count(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> None:
        """Takes for the features of the moment."""
        names = hash_columns([f"user-{user}" for user in users.tolist()])[:, 0]
        events = self.rng.integers(1, 1 << 62, len(items))
        seconds = np.full(len(items), self.second)
        takes = TakeColumns(names, items, seconds, events, np.zeros(len(items), bool))
        self.trainer.moment.add(takes, before=self.second + 1)

    def put(self, item: int) -> None:
        """A vector for an item."""
        vector = self.rng.standard_normal(DIM, np.float32)
        self.trainer.put_embedding(
            ItemEmbedding.model_construct(
                item_id=f"item-{item}",
                vector=(vector / np.linalg.norm(vector)).tobytes(),
                dim=DIM,
                encoder_version=VERSION,
                content_hash=f"{self.rng.integers(1 << 60):032x}",
                published_at=NOW,
            )
        )

    def change(self, share: float) -> None:
        """A share of the users takes an item, a share of the items gets a vector, and some rows are learned."""
        for item in self.rng.choice(self.items, int(share * self.items), replace=False).tolist():
            self.put(item)
        users = self.rng.choice(self.users, int(share * self.users), replace=False)
        items = self.rng.integers(1, self.items + 1, len(users))
        self.count(users, items)
        for user, item in zip(users.tolist(), items.tolist(), strict=True):
            self.trainer.intake._join._append(Take(self.second, f"user-{user}", item))
            self.trainer._take_counts.add(item, self.second)
        self.learn(1_000)

    def learn(self, events: int) -> None:
        """Exposures and clicks through the trainer's own path."""
        trainer = self.trainer
        for _ in range(events):
            self.second += 1
            kind = BehaviourKind.EXPOSURE if self.takes % 4 else BehaviourKind.CLICK
            self.takes += 1
            event = Behaviour(
                event_id=f"e{self.takes}",
                kind=kind,
                user_id=f"user-{self.rng.integers(self.users)}",
                item_id=f"item-{self.rng.integers(self.items)}",
                occurred_at=datetime.fromtimestamp(self.second, UTC),
            )
            trainer.intake.observe(0, self.takes, event)
        trainer.intake.advance()
        while trainer.step() is not None:
            trainer.intake.advance()
        trainer.progress.drain_scores()
        if trainer.release_due():
            trainer.begin_next()


class PeakMemory:
    """The largest resident memory while it is open, sampled."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--changed", type=float, default=0.01, help="share that changes before each snapshot")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the snapshots go; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="where the figures go beside the output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mimstream-bench-", dir=options.folder) as name:
        result = measure(options, Path(name))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A whole snapshot, incremental ones, and a trainer restored from the last of them."""
    world = World(options.items, options.users)
    began = time.perf_counter()
    world.fill()
    print(f"filled in {time.perf_counter() - began:.0f} s, {_resident() / 1e9:.2f} GB resident", flush=True)
    stores = [
        FolderArtifactStore(folder, entries=entries, pointer=f"{entries}.json", named="here")
        for entries in ("snapshots", "pieces")
    ]
    store = CheckpointStore(*stores, keep=3, named="here")
    since, held = None, {}
    rounds = []
    for number in range(options.rounds + 1):
        if number:
            world.change(options.changed)
        with PeakMemory() as memory:
            began, own = time.perf_counter(), time.thread_time()
            state = State()
            state.put("trainer", world.trainer.state())
            state = state.frozen(held)
            frozen, own = time.perf_counter() - began, time.thread_time() - own
            meta = store.write(state, _meta(world), None, since=since)
            written = time.perf_counter() - began
        since, held = meta.snapshot_id, {name: copy.held for name, copy in state.copies.items()}
        del state
        rounds.append(
            {
                "kind": "incremental" if number else "whole",
                "standstill_ms": round(1e3 * frozen, 1),
                "standstill_cpu_ms": round(1e3 * own, 1),
                "seconds": round(written, 2),
                "megabytes": round(_bytes_of(folder, meta) / 1e6, 1),
                "more_memory_megabytes": round((memory.peak - memory.before) / 1e6, 1),
            }
        )
        print(rounds[-1], flush=True)
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    began = time.perf_counter()
    found = store.load(since or "")
    again = OnlineTrainer(world.trainer.config, encoder_version=VERSION, dim=DIM, partitions=[0])
    again.restore(found.state.part("trainer"))
    restored = time.perf_counter() - began
    whole, ours = world.trainer.snapshot().arrays, again.snapshot().arrays
    same = whole.keys() == ours.keys() and all(whole[name].tobytes() == ours[name].tobytes() for name in whole)
    result = {
        "items": options.items,
        "users": options.users,
        "changed": options.changed,
        "rounds": rounds,
        "megabytes_on_disk": round(on_disk / 1e6, 1),
        "seconds_to_restore": round(restored, 1),
        "restored_equals": same,
        "load": round(os.getloadavg()[0], 1),
    }
    print({name: value for name, value in result.items() if name != "rounds"}, flush=True)
    return result


def _bytes_of(folder: Path, meta: CheckpointMeta) -> int:
    number = meta.snapshot_id[1:7]
    entries = [*folder.glob(f"snapshots/n{number}-*"), *folder.glob(f"pieces/p{number}-*")]
    return sum(path.stat().st_size for entry in entries for path in entry.iterdir())


def _meta(world: World) -> CheckpointMeta:
    progress = world.trainer.progress
    return CheckpointMeta(
        created_at=NOW,
        encoder_version=VERSION,
        dim=DIM,
        offsets={"behaviours": {0: world.takes}},
        cluster_id="c",
        topic_ids={},
        config={},
        code_sha256="",
        rows_trained=progress.rows,
        rows_sha256=progress.rows_sha256,
    )


if __name__ == "__main__":
    main()
