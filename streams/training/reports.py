"""What the trainer tells the world while it runs: its accounts as a small JSON file, its scores as parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from schemas.errors import StoreUnavailable

ACCOUNTS_FILE = "accounts.json"


@dataclass(slots=True)
class LoopProgress:
    """What is told of training and the trainer itself does not say; goes into snapshots, and grows while it runs."""

    rows: int = 0
    """Rows trained."""
    last_event_at: int | None = None
    """Event time of the last trained row, in seconds since 1970."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Running prequential metrics at the newest release."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """Where the trainer stands."""

    accounts: Mapping[str, int]
    """received = trained + late + duplicate + dead_lettered + erased + pending."""
    offsets: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Next offset to read per topic (without prefix) and partition, such that everything below is settled."""
    corrected: int = 0
    """Rows learned as not taken that a late take has corrected: rows, but no events of their own."""
    steps: int = 0
    rows_trained: int = 0
    rows_sha256: str = ""
    releases: int = 0
    """Releases made by this process that became current."""
    refused: int = 0
    """Candidates that the promotion gate kept back."""
    held: int = 0
    """Candidates that passed and did not become current, because a person had chosen otherwise."""
    release_id: str | None = None
    """The current release, as far as this process knows."""
    last_event_at: int | None = None
    """Event time of the last trained row, in seconds since 1970."""
    waiting_for: int = 0
    """Items at the head of the stream whose vector has not come."""
    given_up: int = 0
    """Items whose vector was not waited for any longer."""
    broken_vectors: int = 0
    """Records of `embeddings` that cannot be read."""
    other_encoders: int = 0
    """Records of `embeddings` of another encoder version; ignored."""
    prequential: Mapping[str, float | None] = field(default_factory=dict)
    """Running prequential metrics at the newest release."""
    updated_at: float = 0.0
    """Wall clock, in seconds since 1970."""


NO_ACCOUNTS: Mapping[str, int] = dict.fromkeys(
    ("received", "trained", "late", "duplicate", "dead_lettered", "erased", "pending"), 0
)


def write_accounts(folder: Path, report: TrainReport) -> None:
    """Replace `accounts.json`: a reader sees the old text or the new one. Raises `StoreUnavailable`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{ACCOUNTS_FILE}-{os.getpid()}"
        fresh.write_text(json.dumps(asdict(report), indent=2))
        os.replace(fresh, folder / ACCOUNTS_FILE)
    except OSError as error:
        raise StoreUnavailable("state folder", f"{folder} (MIM_TRAIN__STATE_FOLDER): {error}") from error
