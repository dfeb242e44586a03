"""Events per second of the trainer on one core, from the bytes of a record to a step.

    python -m tests.benchmarks.trainer_path DIR

The records are those that `mimstream replay DIR` sends, with the vectors of MIM_ENCODER__BUNDLE; decoding, merging of
partitions, join, features and steps are the classes of `mimstream train` under its settings. Kafka, releases and
snapshots are left out. CPU time of this process; the first fifth of the events is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from itertools import islice
from pathlib import Path

import torch

from streams.broker.partitioning import home_partition
from streams.broker.records import behaviour_of
from streams.settings import load_settings
from streams.simulation.click_log import Record
from streams.simulation.run import HeldVectors
from streams.training.feed import FeedBatch
from streams.training.trainer_thread import TrainerThread
from streams.wiring.simulation import open_simulation
from streams.wiring.training import trainer_maker
from trainer.online.embedding_wait import EmbeddingWait
from trainer.samples.partition_merge import Entry, PartitionMerge

AT_ONCE = 512


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trainer_path", description=__doc__)
    parser.add_argument("folder", type=Path, help="data-set folder")
    parser.add_argument("--limit", type=int, default=150_000, help="events")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_settings()
    simulation = open_simulation(
        settings,
        options.folder,
        neg_type="pop",
        seed=0,
        takes=None,
        limit=options.limit,
        broken=0.0,
        vectors="bundle",
        queries="off",
    )
    partitions = settings.topics.partitions
    produced, ends = simulation.timeline.now.timestamp(), dict.fromkeys(range(partitions), 0)
    records = []
    for outgoing in islice(simulation.timeline.behaviour_records(), simulation.events):
        partition = home_partition(outgoing.key, partitions)
        records.append(Record(partition, ends[partition], int(1000 * produced), outgoing.key, outgoing.value))
        ends[partition] += 1
    reads = HeldVectors(partitions)
    reads.put(simulation.embeddings(0)[0])
    thread = TrainerThread(reads, trainer_maker(settings), waits=EmbeddingWait(timeout_seconds=0.0))
    thread.put_embeddings()
    assert thread.trainer is not None, "the folder has items"
    merge = PartitionMerge(range(partitions), room_per_partition=1 << 20)
    stop, seconds, counted, rows = asyncio.Event(), {"decode": 0.0, "merge": 0.0, "learn": 0.0}, 0, 0
    for start in range(0, len(records), AT_ONCE):
        chunk = records[start : start + AT_ONCE]
        times = [time.process_time()]
        decoded = [
            Entry(record.partition, record.offset, produced, behaviour_of(record, settings.kafka, {}), produced)
            for record in chunk
        ]
        times.append(time.process_time())
        for partition in range(partitions):
            merge.add(partition, [entry for entry in decoded if entry.partition == partition])
        merge.set_exhausted(dict.fromkeys(range(partitions), float("inf")))
        entries = merge.pop(AT_ONCE)
        times.append(time.process_time())
        before = thread.trainer.progress.rows
        missing = thread.run_once(FeedBatch(entries, (), (), finish=False), stop=stop, releases=False).missing
        while missing:
            missing = thread.run_once(FeedBatch((), (), missing, finish=False), stop=stop, releases=False).missing
        times.append(time.process_time())
        if thread.trainer.release_due():
            thread.trainer.begin_next()
        if start >= len(records) // 5:
            counted, rows = counted + len(chunk), rows + thread.trainer.progress.rows - before
            for name, began, ended in zip(seconds, times, times[1:], strict=False):
                seconds[name] += ended - began
    found = {f"{name}_us": round(1e6 * spent / counted, 1) for name, spent in seconds.items()}
    per_second = round(counted / sum(seconds.values()))
    print(json.dumps({"events_per_second": per_second, "events": counted, "rows": rows} | found))


if __name__ == "__main__":
    main()
