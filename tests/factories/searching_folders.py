"""Small folders whose rows say what was searched and which item was looked at just before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.factories.offline_folders import DAY, START, write

SEARCHED: list[tuple[str | None, bytes | None]] = [
    ("red shoe", None), ("  red   shoe ", None), ("hat", None), ("a blue hat", None), (None, b"photo of a hat"),
    ("green coat", b"photo of a coat"), (None, None),
]  # fmt: skip
TITLES = ["Red shoe", "Blue hat", "Green coat", "A red hat"]


def write_searching(
    folder: Path, *, users: int = 60, items: int = 30, takes: int = 240, shown: int | None = 3, seed: int = 0
) -> Path:
    """Takes of ten days, none of them twice, in the order of their rows; `shown` exposures beside each, or none.

    Searches, and triggers on two rows of three, are in the takes alone.
    """
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(users * items)[:takes]
    ts = np.sort(rng.choice(10 * DAY, takes, replace=False)) + START + 1
    user, item = [f"u{pair // items}" for pair in pairs], [f"i{pair % items}" for pair in pairs]
    searched = [SEARCHED[int(place)] for place in rng.integers(0, len(SEARCHED), takes)]
    write(
        folder,
        "items",
        item_id=[f"i{n}" for n in range(items)],
        title=[TITLES[n % len(TITLES)] for n in range(items)],
        category=["ab"[n % 2] for n in range(items)],
        publish_ts=[START] * items,
    )
    write(
        folder,
        "interactions",
        user_id=user,
        item_id=item,
        ts=ts.tolist(),
        label=[1] * takes,
        query_text=[text for text, _ in searched],
        query_image=[image for _, image in searched],
        trigger_item=[f"i{rng.integers(items)}" if rng.random() < 2 / 3 else None for _ in range(takes)],
    )
    if shown is not None:
        beside: dict[str, list[Any]] = {"user_id": [], "item_id": [], "ts": []}
        taken = set(zip(user, item, strict=True))
        for who, what, when in zip(user, item, ts.tolist(), strict=True):
            for other in rng.permutation(items)[:shown].tolist():
                if (who, f"i{other}") not in taken and f"i{other}" != what:
                    beside["user_id"].append(who)
                    beside["item_id"].append(f"i{other}")
                    beside["ts"].append(when)
        write(folder, "exposures", **beside)
    return folder
