"""A small world of items and takes, and the features of the moment by plain loops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.features.config import HALF_LIVES, RECENT, FeatureConfig
from trainer.features.state import FeatureState
from trainer.features.states import item_hash
from trainer.features.take_columns import TakeColumns
from trainer.samples.id_hashes import hash_columns
from trainer.samples.item_facts import FactRows, facts_of

NO_SOURCE = (0, 0)


@dataclass(frozen=True)
class Take:
    """A take by plain numbers; `event` is never 0."""

    user: int
    item: int
    second: int
    event: int
    announces: bool = False
    query: int = 0
    trigger: int = 0


def columns_of(takes: list[Take]) -> TakeColumns:
    """Takes as a step adds them."""
    return TakeColumns(
        np.array([take.user for take in takes], np.int64),
        np.array([take.item for take in takes], np.int64),
        np.array([take.second for take in takes], np.int64),
        np.array([take.event for take in takes], np.int64),
        np.array([take.announces for take in takes], bool),
        np.array([take.query for take in takes], np.int64),
        np.array([take.trigger for take in takes], np.int64),
    )


class World:
    """Items 1 to `items`, with facts that differ."""

    def __init__(self, config: FeatureConfig, items: int, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.config = config
        self.names = ["", *(f"i{n}" for n in range(1, items + 1))]
        self._hashes = hash_columns(["", *(f"i{n}" for n in range(1, items + 1))])
        self._hashes[0] = 0
        self._facts = FactRows.empty(config, items + 1)
        self.described: list[dict[str, object]] = [{}]
        for number in range(1, items + 1):
            one: dict[str, object] = {
                "category": rng.choice(["", "shoes", "hats", "coats"]),
                "price": float(rng.integers(1, 50)) if rng.random() < 0.8 else None,
                "year": int(rng.integers(1990, 2020)) if rng.random() < 0.7 else None,
                "attributes": {
                    "genres": [f"g{n}" for n in rng.choice(6, int(rng.integers(0, 4)), replace=False)],
                    "colour": f"c{rng.integers(4)}" if rng.random() < 0.8 else "",
                },
                "published_at": float(rng.integers(-50_000, 50_000)),
                "published_at_is": ("known", "inferred", "unknown")[rng.integers(3)],
            }
            self.described.append(one)
            self._facts.put(number, facts_of(config, **one))  # type: ignore[arg-type]

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._hashes[numbers]

    def facts(self, numbers: NDArray[np.int64]) -> FactRows:
        return self._facts.rows(numbers)

    def hash(self, item: int) -> int:
        return int(item_hash(self._hashes[[item]])[0])


def random_takes(count: int, *, users: int, items: int, seconds: int, seed: int) -> list[Take]:
    """Takes in order of time, many of them in one second."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.integers(0, seconds, count))
    popular = rng.integers(1, items + 1, count) * rng.random(count)
    return [
        Take(int(rng.integers(1, users + 1)), 1 + int(popular[n]), int(at[n]), n + 1, bool(rng.random() < 0.05))
        for n in range(count)
    ]


@dataclass
class Row:
    """A row to compute features for; `source` is event and second of the take that it was drawn from."""

    target: int
    history: list[int]
    """Newest first."""
    seconds: list[int]
    now: int
    source: tuple[int, int] = NO_SOURCE
    query: int = 0


@dataclass
class PlainFeatures:
    """The features by loops over all takes that count for a step; pairs without a bound on partners."""

    world: World
    counted: list[Take] = field(default_factory=list)

    def pairs(self, takes: list[Take]) -> Counter[tuple[int, int]]:
        """Pairs of items that one user took, each take with those before it."""
        length = self.world.config.history_length
        found: Counter[tuple[int, int]] = Counter()
        newest: dict[int, list[int]] = {}
        for take in sorted(takes, key=lambda take: (take.second, take.user, take.event)):
            mine = newest.setdefault(take.user, [])
            for other in mine[-length:]:
                found[tuple(sorted((take.item, other)))] += 1  # type: ignore[index]
            mine.append(take.item)
        return found

    def row(self, row: Row) -> dict[str, float]:
        """The features by name."""
        config, described = self.world.config, self.world.described
        counted = [take for take in self.counted if not take.announces]
        left = [take for take in counted if take.event != row.source[0]]
        own = [take.second for take in left if take.item == row.target]
        history = row.history[: config.history_length]
        weights = [2 ** (-back / RECENT) for back in range(len(history))]
        total = sum(weights) or 1e-9
        past = [second for second in row.seconds[: len(history)] if second < row.now]
        about = described[row.target]
        found = {
            "history length": math.log1p(len(history)),
            "has history": float(bool(history)),
            "user idle": math.log1p((row.now - max(past)) / 3_600) if past else 0.0,
            "takes": math.log1p(len(own)),
            "item idle": math.log1p((row.now - max(own)) / 3_600) if own else 0.0,
        }
        for name, half_life in HALF_LIVES.items():
            found[f"takes {name}"] = math.log1p(sum(2 ** (-(row.now - second) / half_life) for second in own))
        known = about["published_at_is"] == "known" or (about["published_at_is"] == "inferred" and bool(own))
        found["age known"] = float(known)
        found["age"] = math.log1p(max(0.0, row.now - about["published_at"]) / 3_600) if known else 0.0  # type: ignore[operator]

        category = about["category"]
        same = [bool(category) and described[item]["category"] == category for item in history]
        categories = {described[take.item]["category"] for take in counted}
        taken = sum(described[take.item]["category"] == category for take in left)
        usual = (taken + 1) / (len(left) + max(1, len(categories)))
        found["category takes"] = math.log1p(sum(same))
        found["category share"] = sum(same) / max(1, len(history))
        found["category lift"] = math.log((sum(same) + 5 * usual) / (len(history) + 5) / usual) if category else 0.0
        found["category popularity"] = math.log(usual)
        found["category recent"] = sum(w for w, yes in zip(weights, same, strict=True) if yes) / total
        found["category newest"] = float(bool(same) and same[0])
        for name in config.numbers:
            found |= self._number(name, row.target, history, weights)
        for name in config.attributes:
            found |= self._group(name, row.target, history, weights, total, counted, left)
        if config.queries:
            asked = [take for take in left if take.query == row.query] if row.query else []
            found |= self._led_to("query", bool(row.query), asked, row, left, own)
            newest = history[0] if history else 0
            after = [take for take in left if take.trigger == newest] if newest else []
            found |= self._led_to("trigger", bool(newest), after, row, left, own)
        return found | self._together(row.target, history, weights, total, counted, left, own)

    def _led_to(
        self, name: str, has: bool, after: list[Take], row: Row, left: list[Take], own: list[int]
    ) -> dict[str, float]:
        count = sum(take.item == row.target for take in after)
        usual = len(after) * len(own) / max(1, len(left) + (row.source != NO_SOURCE))
        return {
            f"{name} together": math.log1p(count),
            f"{name} share": count / (len(after) + 2),
            f"{name} lift": math.log((count + 0.5) / (usual + 0.5)) if has else 0.0,
        }

    def _number(self, name: str, target: int, history: list[int], weights: list[float]) -> dict[str, float]:
        def value(item: int) -> float | None:
            raw = self.world.described[item][name]
            return None if raw is None else math.log(raw) if name == "price" else (raw - 2_000) / 10  # type: ignore[operator,arg-type]

        own = value(target)
        known = [(w, value(item)) for w, item in zip(weights, history, strict=True) if value(item) is not None]
        total = sum(w for w, _ in known)
        has = own is not None and total > 0
        mean = sum(w * v for w, v in known) / total if has else 0.0  # type: ignore[operator]
        away = sum(w * abs(v - own) for w, v in known) / total if has else 0.0  # type: ignore[operator]
        return {
            name: own or 0.0,
            f"{name} known": float(own is not None),
            f"{name} against history": own - mean if has else 0.0,  # type: ignore[operator]
            f"{name} away from history": away,
            f"{name} of history": mean,
        }

    def _group(
        self,
        name: str,
        target: int,
        history: list[int],
        weights: list[float],
        total: float,
        counted: list[Take],
        left: list[Take],
    ) -> dict[str, float]:
        def words(item: int) -> list[str]:
            value = self.world.described[item]["attributes"][name]  # type: ignore[index]
            return [value] if isinstance(value, str) and value else list(value)

        counts = Counter(word for take in counted for word in words(take.item))

        def bag(item: int) -> dict[str, float]:
            raw = {word: math.log1p(len(counted) / (counts[word] + 1)) + 0.1 for word in words(item)}
            length = math.sqrt(sum(v * v for v in raw.values())) or 1.0
            return {word: v / length for word, v in raw.items()}

        own = bag(target)
        cosines = [sum(v * bag(item).get(word, 0.0) for word, v in own.items()) for item in history]
        others = Counter(word for take in left for word in words(take.item))
        usual = [math.log((others[word] + 1) / (len(left) + 100)) for word in own]
        return {
            f"{name} shared": sum(w * c for w, c in zip(weights, cosines, strict=True)) / total,
            f"{name} share": sum(cosines) / max(1, len(history)),
            f"{name} popularity": sum(usual) / max(1, len(usual)),
        }

    def _together(
        self,
        target: int,
        history: list[int],
        weights: list[float],
        total: float,
        counted: list[Take],
        left: list[Take],
        own: list[int],
    ) -> dict[str, float]:
        pairs = self.pairs(left)
        takes = Counter(take.item for take in counted)
        count = [pairs[tuple(sorted((target, item)))] for item in history]  # type: ignore[index]
        near = [c / math.sqrt((len(own) + 2) * (takes[item] + 2)) for c, item in zip(count, history, strict=True)]
        usual = sum(math.sqrt((len(own) + 1) * (takes[item] + 1)) for item in history)
        return {
            "together": math.log1p(sum(count)),
            "together most": math.log1p(max(count, default=0)),
            "together near": sum(w * n for w, n in zip(weights, near, strict=True)) / total,
            "together nearest": max(near, default=0.0),
            "together lift": math.log((sum(count) + 0.5) / (usual + 1)),
        }


def features_of(state: FeatureState, rows: list[Row], *, shared_history: bool = False) -> NDArray[np.float32]:
    """The features of rows as a runner computes them."""
    from trainer.features.columns import features

    width = max(1, *(len(row.history) for row in rows))
    targets = np.array([row.target for row in rows], np.int64)
    history, seconds = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        history[at, : len(row.history)], seconds[at, : len(row.seconds)] = row.history, row.seconds
    if shared_history:
        history, seconds = history[:1], seconds[:1]
    queries = np.array([row.query for row in rows], np.int64)
    numbers, places = np.unique(np.concatenate([[0], targets, history.ravel(), queries]), return_inverse=True)
    sources = np.array([row.source for row in rows], np.int64)
    return features(
        state.config,
        state.states(numbers),
        places[1 : 1 + len(rows)],
        places[1 + len(rows) : 1 + len(rows) + history.size].reshape(history.shape),
        seconds,
        np.array([row.now for row in rows], np.int64),
        state.sources(targets, sources[:, 0], sources[:, 1]),
        places[len(places) - len(rows) :],
    )
