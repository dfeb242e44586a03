"""What the contrastive term and the refreshed projection are worth, measured prequentially on a data-set folder.

    python -m tests.benchmarks.contrastive_term DIR [--events N] [--seeds 3] [--out tests/benchmarks/results]

Every arm learns from the same rows in the same order, from the vectors of the default encoder; arms differ in the
projection (fixed or learning) and in the negatives of the contrastive term (none, space, time, both). Resumable: an arm
that stands in the results file already is not run again.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from encoders.config import EncoderConfig
from encoders.loading import load_encoder
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.items import ItemEmbedding, SourceOffset
from streams.encoder_training.bundle_builder import contents_of
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import DataSet, open_data_set
from trainer.metrics import ScoredRows, paired_report, prequential_report
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.online.variants import CIUBM, DIN

ARMS: dict[str, dict[str, object]] = {
    "projection fixed, no term": {"model": {"refresh_projection": False}, "learner": {"contrastive_weight": 0.0}},
    "projection learns, no term": {"learner": {"contrastive_weight": 0.0}},
    "term: in-batch only": {"space_negatives": 0, "time_negatives": 0},
    "term: + space": {"time_negatives": 0},
    "term: + time": {"space_negatives": 0},
    "term: + space and time (default)": {},
    "term x 5": {"learner": {"contrastive_weight": 0.5}},
}


def encode_items(data: DataSet) -> list[ItemEmbedding]:
    """All items of the set through the default encoder."""
    encoder = load_encoder(EncoderConfig())
    contents = list(contents_of(data))
    vectors: list[NDArray[np.float32]] = []
    for start in track(range(0, len(contents), 128), description="encoding", transient=True):
        vectors += list(encoder.encode([encoder.prepare(content) for content in contents[start : start + 128]]))
    return [
        ItemEmbedding(
            item_id=item_id,
            encoder_version=encoder.version,
            vector=base64.b64encode(vector.astype("<f4").tobytes()),
            dim=encoder.dim,
            content_hash=item_id,
            published_at=datetime.fromtimestamp(int(publish_ts), UTC),
            source=SourceOffset(partition=0, offset=0),
        )
        for item_id, publish_ts, vector in zip(data.item_ids, data.publish_ts, vectors, strict=True)
    ]


def run(data: DataSet, vectors: list[ItemEmbedding], config: TrainerConfig, *, events: int | None) -> ScoredRows:
    """One arm: every behaviour of the set through the trainer."""
    log = behaviours_of(data, seed=1, events=events)
    trainer = OnlineTrainer(
        config, encoder_version=vectors[0].encoder_version, dim=vectors[0].dim, partitions=[0], variants=(CIUBM, DIN)
    )
    for vector in vectors:
        trainer.put_embedding(vector)
    scores: list[ScoredRows] = []

    def learn() -> None:
        trainer.intake.advance()
        while trainer.step() is not None:
            trainer.intake.advance()
        scores.extend(trainer.progress.drain_scores())

    for position in track(range(len(log)), description="learning", transient=True):
        is_take = bool(log.is_take[position])
        trainer.intake.observe(
            0,
            position,
            Behaviour.model_construct(
                event_id=f"{'t' if is_take else 'x'}{log.exposure_name(position)}",
                kind=BehaviourKind.CLICK if is_take else BehaviourKind.EXPOSURE,
                user_id=data.user_ids[log.user[position]],
                item_id=data.item_ids[log.item[position]],
                occurred_at=datetime.fromtimestamp(int(log.ts[position]), UTC),
                exposure_id=f"x{log.exposure_name(position)}" if is_take else None,
                defines_publish=bool(log.defines_publish[position]),
            ),
        )
        if position % 4096 == 0:
            learn()
    trainer.intake.finish()
    learn()
    return ScoredRows.concatenate(scores)


def main() -> None:
    """Parse, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data_set(options.folder)
    path = options.out / f"contrastive_term_{data.name}_cpu.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["arm"], row["seed"], row["events"]) for row in rows}
    vectors: list[ItemEmbedding] = []
    for seed in range(options.seeds):
        for arm, changes in ARMS.items():
            if (arm, seed, options.events) in done:
                continue
            vectors = vectors or encode_items(data)
            started = time.monotonic()
            config = TrainerConfig.model_validate({"seed": seed, **changes})
            scored = run(data, vectors, config, events=options.events)
            paired = paired_report(scored, CIUBM, DIN, rng=np.random.default_rng(0))["overall"]
            row = {"data": data.name, "events": options.events, "arm": arm, "seed": seed}
            row |= {"encoder_version": vectors[0].encoder_version, "buckets": prequential_report(scored)[CIUBM]}
            row["minus_din"] = None if paired is None else [paired.difference, paired.low, paired.high]
            row["seconds"] = round(time.monotonic() - started, 1)
            rows.append(row)
            path.write_text(json.dumps(rows, indent=1) + "\n")
    for arm in ARMS:
        cells = []
        for bucket in ("overall", "under_24h", "older"):
            found = [row["buckets"][bucket] for row in rows if row["arm"] == arm]
            values = [one["gauc"] for one in found if one is not None]
            cells.append(f"{bucket} {np.mean(values):.4f} ± {np.std(values):.4f}" if values else f"{bucket} -")
        print(f"{arm:36s}", " | ".join(cells))


if __name__ == "__main__":
    main()
