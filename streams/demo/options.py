"""What a demo runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.datasets.exposures import Behaviours
from trainer.datasets.folder import DataSet

SEARCHES = 1_000
"""Distinct searches that the steady load asks with."""


@dataclass(frozen=True)
class DemoOptions:
    """What to run."""

    data: DataSet
    behaviours: Behaviours
    pictures: str
    """What the pictures are, in words."""
    seed: int
    broken_share: float
    requests_per_second: float
    sample_items: int
    config_file: Path | None

    @property
    def has_searches(self) -> bool:
        """Whether users of the set searched for anything, by words or by photos."""
        return self.data.searches is not None and len(self.data.searches) > 0

    @property
    def searches(self) -> list[str]:
        """Some of the words that users of the set searched for."""
        searches = self.data.searches
        texts = () if searches is None else map(searches.text, range(min(len(searches), SEARCHES)))
        return [text for text in texts if text]
