"""The trainer that nothing ever happens to: fed from the same log, in this process, round after round."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from schemas.behaviours import Behaviour
from schemas.items import ItemEmbedding, parse_embedding_key
from schemas.queries import QueryEmbedding
from tests.faults.oracle import Logged, good_behaviour
from tests.faults.scenario import PARTITIONS
from tests.faults.world import Log
from trainer.online.config import TrainerConfig
from trainer.online.trainer import OnlineTrainer
from trainer.samples.searches import query_item


class Standing(NamedTuple):
    """Where an uninterrupted trainer stood after a step."""

    rows: int
    rows_sha256: str


class Reference:
    """Remembers, for every number of steps, what an uninterrupted trainer had learned from by then."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._trainer: OnlineTrainer | None = None
        self._read: dict[tuple[str, int], int] = {}
        self.after: dict[int, Standing] = {0: Standing(0, "")}

    def follow(self, embeddings: Log, queries: Log, behaviours: Log) -> None:
        """Take in what is new in the log and learn from what is settled."""
        for record in self._new(embeddings):
            version, item_id = parse_embedding_key(record.key or b"")
            if record.value is None:
                if self._trainer is not None:
                    self._trainer.delete_item(item_id)
                continue
            embedding = ItemEmbedding.model_validate_json(record.value)
            if self._trainer is None:
                self._trainer = OnlineTrainer(
                    self._config, encoder_version=version, dim=embedding.dim, partitions=range(PARTITIONS)
                )
            self._trainer.put_embedding(embedding)
        trainer = self._trainer
        if trainer is None:
            return
        for record in self._new(queries):
            found = QueryEmbedding.model_validate_json(record.value or b"")
            assert found.vector is not None, "rounds search for nothing that cannot be encoded"
            trainer.put_query(query_item(found.query), np.frombuffer(found.vector, "<f4"))
        for record in self._new(behaviours):
            event = good_behaviour(record)
            if event is None:
                trainer.intake.observe_broken(record.partition, record.offset)
            else:
                behaviour = Behaviour.model_validate_json(json.dumps(event))
                trainer.intake.observe(record.partition, record.offset, behaviour)
        trainer.intake.advance()
        rows = self.after[trainer.progress.steps].rows
        while (report := trainer.step()) is not None:
            rows += report.rows
            self.after[trainer.progress.steps] = Standing(rows, trainer.progress.rows_sha256)
            trainer.intake.advance()
        trainer.progress.drain_scores()

    def _new(self, log: Log) -> list[Logged]:
        found: list[Logged] = []
        for partition, records in sorted(log.records.items()):
            begin = self._read.get((log.name, partition), 0)
            found += records[begin:]
            self._read[log.name, partition] = len(records)
        return found
