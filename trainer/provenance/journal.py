"""What training decided since the last candidate was taken: which rows made each step, against which negatives, with
which vectors. Together with the click log it says exactly what a release was trained on.

Rows are kept as places in the log, never as a copy of it. Four things depend on when something happened and are kept
here because nothing else records them: where batches begin, which negatives were drawn, which vector each item had, and
the features of each row.

The rows' hash is a tree: a leaf per user (the chain over that user's rows in training order), and a root over the
sorted leaves, the negatives and the vectors. Leaves carry no name, so that what is left still verifies after a user was
erased: the leaves that no rows lead to any more are those of erased users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from trainer.negatives.sampler import ContrastivePlan
from trainer.samples.catalogue import Catalogue
from trainer.samples.rows import Impression, learned_as
from trainer.state import State, ragged, unragged, whole_numbers
from trainer.tables import Slots

EMPTY = b""
NO_FEATURES = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class VectorUse:
    """From `step` on, rows saw this vector of the item; an empty digest says that it had none any more."""

    step: int
    item: str
    digest: bytes
    content: str
    published_at: float


@dataclass(slots=True)
class StepRows:
    """One step: its rows in order, as places in the log, and its negatives."""

    places: NDArray[np.int64]
    """(B, 3) partition, offset, and the running number of an exposure that was drawn there, 0 for one of the log."""
    labels: NDArray[np.int64]
    """(B,)"""
    negatives: list[str] | None
    """Distinct candidates of the contrastive term; None for a step without one."""
    drawn: list[str] = field(default_factory=list)
    """Items of the rows that were drawn beside a take, in their order."""
    features: NDArray[np.float32] | None = None
    """(B, F) numeric inputs: the state that they are of is not kept. None where an earlier build kept none."""

    @property
    def beside_takes(self) -> list[tuple[int, int, int]]:
        """Places of the rows that were drawn beside a take; a take's own exposure has number 1."""
        return [(p, o, draw) for p, o, draw in self.places.tolist() if draw > 1]


@dataclass(slots=True)
class Leaf:
    """The chain over one user's rows."""

    digest: bytes = EMPTY
    rows: int = 0

    def add(self, row: bytes) -> None:
        """Extend the chain."""
        self.digest = hashlib.sha256(self.digest + row).digest()
        self.rows += 1


@dataclass
class Segment:
    """The journal between two candidates."""

    first_row: int = 0
    """Rows trained before it."""
    first_step: int = 0
    """Steps taken before it."""
    steps: list[StepRows] = field(default_factory=list)
    vectors: list[VectorUse] = field(default_factory=list)
    archive: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)
    """Digest -> vector, for all of `vectors`."""
    leaves: list[Leaf] = field(default_factory=list)
    kinds: bool = False
    """Whether the hash of a row says as what it was taken, and what that was worth."""

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return sum(len(step.labels) for step in self.steps)

    @property
    def drawn(self) -> dict[tuple[int, int, int], str]:
        """Items of the rows that were drawn beside a take, by their places."""
        return {place: item for step in self.steps for place, item in zip(step.beside_takes, step.drawn, strict=True)}

    @property
    def name(self) -> str:
        """Its first row and the head of its hash."""
        return f"s{self.first_row:09d}-{self.root[:12]}"

    @property
    def root(self) -> str:
        """The hash over all rows, negatives and vectors, as hex digits."""
        return root_of(self.leaves, self.negatives_digest, self.vectors_digest)

    @property
    def negatives_digest(self) -> bytes:
        """Hash over the negatives of all steps."""
        lines = ("\t".join(step.negatives or ()) + "\n" for step in self.steps)
        return hashlib.sha256("".join(lines).encode()).digest()

    @property
    def vectors_digest(self) -> bytes:
        """Hash over which vectors were seen from which step on."""
        lines = (f"{use.step}\t{use.item}\t{use.digest.hex()}\t{use.content}\n" for use in self.vectors)
        return hashlib.sha256("".join(lines).encode()).digest()

    def to_state(self) -> State:
        """As arrays and values; vectors of the archive are not among them."""
        names = sorted({name for step in self.steps for name in step.negatives or ()})
        number = {name: i for i, name in enumerate(names)}
        state = State(values={"first_row": self.first_row, "first_step": self.first_step, "kinds": self.kinds})
        state.arrays["places"] = np.concatenate([np.zeros((0, 3), np.int64), *(step.places for step in self.steps)])
        state.arrays["labels"] = np.concatenate([np.zeros(0, np.int64), *(step.labels for step in self.steps)])
        kept = [step.features for step in self.steps if step.features is not None]
        if kept:
            state.arrays["features"] = np.concatenate(kept)
        state.arrays["sizes"] = whole_numbers(len(step.labels) for step in self.steps)
        state.arrays["contrastive"] = np.array([step.negatives is not None for step in self.steps], bool)
        state.put_texts("names", names)
        state.put_texts("drawn", (item for step in self.steps for item in step.drawn))
        state.arrays.update(
            ragged("negatives", ([number[n] for n in step.negatives or ()] for step in self.steps)).arrays
        )
        state.arrays["vectors.step"] = whole_numbers(use.step for use in self.vectors)
        state.arrays["vectors.published_at"] = np.array([use.published_at for use in self.vectors], np.float64)
        state.put_texts("vectors.item", (use.item for use in self.vectors))
        state.put_texts("vectors.content", (use.content for use in self.vectors))
        state.put_bytes("vectors.digest", (use.digest for use in self.vectors))
        state.put_bytes("leaves", (leaf.digest for leaf in self.leaves))
        state.arrays["leaves.rows"] = whole_numbers(leaf.rows for leaf in self.leaves)
        return state

    @staticmethod
    def from_state(state: State) -> Segment:
        """What `to_state` was made of, without the archive."""
        names, arrays = state.texts("names"), state.arrays
        places = arrays["places"]
        if places.shape[1] == 2:  # an earlier build drew no exposures
            places = np.pad(places, ((0, 0), (0, 1)))
        features = arrays.get("features")
        drawn = iter(state.texts("drawn") if "drawn.ends" in arrays else [])
        steps, end = [], 0
        candidates = zip(unragged("negatives", state), arrays["contrastive"].tolist(), strict=True)
        for size, (numbers, contrastive) in zip(arrays["sizes"].tolist(), candidates, strict=True):
            start, end = end, end + size
            negatives = [names[n] for n in numbers] if contrastive else None
            step = StepRows(places[start:end], arrays["labels"][start:end], negatives)
            if features is not None:
                step.features = features[start:end]
            step.drawn = [next(drawn) for _ in step.beside_takes]
            steps.append(step)
        uses = zip(
            arrays["vectors.step"].tolist(),
            state.texts("vectors.item"),
            state.pieces("vectors.digest"),
            state.texts("vectors.content"),
            arrays["vectors.published_at"].tolist(),
            strict=True,
        )
        return Segment(
            first_row=state.values["first_row"],
            first_step=state.values["first_step"],
            kinds=state.values.get("kinds", False),
            steps=steps,
            vectors=[VectorUse(*use) for use in uses],
            leaves=[
                Leaf(digest, rows)
                for digest, rows in zip(state.pieces("leaves"), arrays["leaves.rows"].tolist(), strict=True)
            ],
        )


def root_of(leaves: Iterable[Leaf], negatives: bytes, vectors: bytes) -> str:
    """The root over leaves, negatives and vectors; the order of the leaves does not matter."""
    lines = sorted(f"{leaf.digest.hex()} {leaf.rows}\n" for leaf in leaves)
    return hashlib.sha256("".join(lines).encode() + negatives + vectors).hexdigest()


def row_text(
    event_id: str,
    item: str,
    learned: str,
    history: Sequence[str],
    seconds: Sequence[int],
    features_F: NDArray[np.float32] = NO_FEATURES,
) -> bytes:
    """What a row's hash covers beside its user: event, item, what it was learned as, the history with its times, and
    the features.
    """
    past = "\t".join(history)
    text = f"{event_id}\t{item}\t{learned}\t{past}\t{','.join(map(str, seconds))}\n".encode()
    return text + np.ascontiguousarray(features_F, "<f4").tobytes()


class Journal:
    """The segment that is being written; `cut` begins the next one."""

    def __init__(self, *, kinds: bool = False) -> None:
        self._archive: Slots[tuple[bytes, NDArray[np.float32]]] = Slots()
        self._kinds = kinds
        self._begin(Segment(kinds=kinds))

    def _begin(self, segment: Segment) -> None:
        self._segment = segment
        self._archive.clear()
        self._leaves: dict[str, Leaf] = {}
        self._nameless: list[Leaf] = []
        self._seen: dict[str, bytes] = {}

    def record(
        self,
        step: int,
        rows: Sequence[Impression],
        plan: ContrastivePlan | None,
        items_U: NDArray[np.int64],
        catalogue: Catalogue,
        features_BF: NDArray[np.float32] | None = None,
    ) -> None:
        """Record a step: `items_U` are the numbers of all items whose vectors it saw, `features_BF` its numbers."""
        segment = self._segment
        negatives = None if plan is None else [catalogue.item_id(int(item)) for item in plan.candidates]
        places = np.array([(row.partition, row.offset, row.draw) for row in rows], np.int64)
        drawn = [catalogue.item_id(row.item) for row in rows if row.draw > 1]
        labels = np.array([row.label for row in rows], np.int64)
        segment.steps.append(StepRows(places, labels, negatives, drawn, features_BF))
        for place, row in enumerate(rows):
            features_F = NO_FEATURES if features_BF is None else features_BF[place]
            history = [catalogue.item_id(item) for item in row.history]
            item = catalogue.item_id(row.item)
            learned = learned_as(row, kinds=self._kinds)
            text = row_text(row.event_id, item, learned, history, row.history_seconds, features_F)
            self._leaves.setdefault(row.user_id, Leaf()).add(text)
        for number in items_U.tolist():
            self._record_vector(step, number, catalogue)

    def forget(self, user_id: str) -> None:
        """Keep the leaf of a user's rows without the user."""
        leaf = self._leaves.pop(user_id, None)
        if leaf is not None:
            self._nameless.append(leaf)

    def segment(self) -> Segment:
        """What was written since the last `cut`."""
        self._segment.leaves = [*self._leaves.values(), *self._nameless]
        return self._segment

    def cut(self, *, rows: int, steps: int) -> Segment:
        """What was written; the next segment begins after `rows` rows and `steps` steps."""
        done = self.segment()
        self._begin(Segment(first_row=rows, first_step=steps, kinds=self._kinds))
        return done

    def snapshot(self) -> State:
        """The unfinished segment, its vectors, and the users of the leaves."""
        now = self.segment()
        # a copy as deep as what grows; a step, a use of a vector and a vector do not change any more
        leaves = [Leaf(leaf.digest, leaf.rows) for leaf in now.leaves]
        segment = replace(now, steps=list(now.steps), vectors=list(now.vectors), archive={}, leaves=leaves)
        users, seen = list(self._leaves), dict(self._seen)
        state = State()
        state.put_table("archive.", self._archive.table(_packed_vectors))
        values = {"first_row": now.first_row, "first_step": now.first_step, "kinds": now.kinds}
        state.put("segment", State(values=values))
        state.later(lambda: _packed(segment, users, seen))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`."""
        segment = Segment.from_state(state.part("segment"))
        earlier = "" if "digests.ends" in state.arrays else "archive."  # an earlier build had them in no table
        rows = list(zip(state.pieces(f"{earlier}digests"), state.arrays[f"{earlier}vectors"], strict=True))
        self._archive = Slots(rows)
        segment.archive = dict(rows)
        users = state.texts("users")
        self._segment = segment
        self._leaves = dict(zip(users, segment.leaves, strict=False))
        self._nameless = segment.leaves[len(users) :]
        self._seen = {}
        if "seen.items.ends" in state.arrays:  # an earlier build named items by number: their vectors are noted again
            self._seen = dict(zip(state.texts("seen.items"), state.pieces("seen.digests"), strict=True))

    def _record_vector(self, step: int, item: int, catalogue: Catalogue) -> None:
        digest, item_id = catalogue.digest(item), catalogue.item_id(item)  # by id: an item may have two numbers
        if self._seen.get(item_id, EMPTY) == digest:
            return
        self._seen[item_id] = digest
        published = catalogue.published_at(item)
        self._segment.vectors.append(VectorUse(step, item_id, digest, catalogue.content(item), published))
        if digest and digest not in self._segment.archive:
            vector = catalogue.vectors(np.array([item]))[0]
            self._segment.archive[digest] = vector
            self._archive.add((digest, vector))


def _packed_vectors(rows: Sequence[tuple[bytes, NDArray[np.float32]] | None]) -> State:
    kept = [row for row in rows if row]
    assert len(kept) == len(rows), "vectors are forgotten all at once"
    state = State({"vectors": np.stack([vector for _, vector in kept]) if kept else np.zeros((0, 0), np.float32)})
    state.put_bytes("digests", (digest for digest, _ in kept))
    return state


def _packed(segment: Segment, users: list[str], seen: dict[str, bytes]) -> State:
    state = State()
    state.put("segment", segment.to_state())
    state.put_texts("users", users)
    state.put_texts("seen.items", seen)
    state.put_bytes("seen.digests", seen.values())
    return state
