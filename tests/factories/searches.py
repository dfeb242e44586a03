"""A server whose release was taught what users search, and encoders of searches that can be held up."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.base import Encoder, ItemContent, Prepared, query_content
from tests.factories.releases import make_manifest
from tests.factories.samples import SMALL_MODEL
from tests.factories.served_states import Trained, opened
from tests.factories.serving import DIM, FEATURES, SEARCH_FEATURES, Bench, Open, WordEncoder
from trainer.networks.ciubm import CiUBM, CtrBatch
from trainer.networks.collate import dense_width
from trainer.networks.item_rows import ItemRows, RequestMoment
from trainer.networks.scorer import Scorer

PHOTO = b"picture of a red boot"
ENCODED_PHOTO = base64.b64encode(PHOTO).decode()


class HeldEncoder(WordEncoder):
    """Counts what it encodes, and encodes while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.encoded: list[ItemContent] = []

    def prepare(self, content: ItemContent) -> Prepared:
        self.encoded.append(content)
        assert self.gate.wait(30)
        both = replace(content, title=f"{content.title} {(content.image or b'').decode()}", image=content.image)
        return super().prepare(both)

    def encode_queries(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        return -self.encode(batch)  # not as items


class Given:
    """An encoder that is loaded."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    async def get(self) -> Encoder:
        return self.encoder


class RecordingScorer(Scorer):
    """Keeps what it was asked for."""

    batches: list[CtrBatch]

    def prepare(self, items: ItemRows, candidates: int, moment: RequestMoment | None = None) -> CtrBatch:
        self.batches.append(super().prepare(items, candidates, moment))
        return self.batches[-1]


def make_network(*, reads_queries: bool = True) -> CiUBM:
    """A small network with weights of a seed; searches make it wider."""
    features = SEARCH_FEATURES if reads_queries else FEATURES
    return CiUBM(SMALL_MODEL, vector_width=DIM, seed=1, dense_width=dense_width(features)).eval()


def search_vector(text: str | None, image: bytes | None = None) -> NDArray[np.float32]:
    """What `HeldEncoder` makes of a search."""
    encoder = HeldEncoder()
    return encoder.encode_queries([encoder.prepare(query_content(text, image))])[0]


async def open_taught(
    open_bench: Open,
    *,
    encoder: Any = None,
    reads_queries: bool = True,
    trained: Trained | None = None,
    **config: Any,
) -> tuple[Bench, RecordingScorer]:
    """A server with a release that reads searches, or not, and the scorer that records."""
    given = None if encoder is None else Given(encoder) if not hasattr(encoder, "get") else encoder
    features = SEARCH_FEATURES if reads_queries else FEATURES
    bench = await opened(open_bench, trained or Trained(features), encoder=given, features=features, **config)
    network = make_network(reads_queries=reads_queries)
    scorer = RecordingScorer(network, make_manifest(1), history_length=3, features=features)
    scorer.batches = []
    model = bench.service.models.current
    assert model is not None
    bench.service.models.current = replace(model, scorer=scorer)
    return bench, scorer


def probabilities(answer: Any) -> list[float]:
    """The scores of an answer."""
    return [one["probability"] for one in answer["scores"]]
