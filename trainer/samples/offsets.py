"""Offsets of the click log: what was read, what may be committed, what was trained on."""

from __future__ import annotations

from collections.abc import Collection

from trainer.state import State, whole_numbers


class OffsetTracker:
    """Per partition, the events that were read and are not done, and the offset below which all are.

    `read_offsets` is the position of the reader and `committed_offsets` the place to which a restart has to return.
    `trained_offsets` depends on the trained rows alone, not on how far ahead of them the reader is.
    """

    def __init__(self, partitions: Collection[int]) -> None:
        self._next = dict.fromkeys(partitions, 0)
        self._open: dict[int, dict[int, None]] = {partition: {} for partition in partitions}
        self._untrained: dict[int, dict[int, None]] = {partition: {} for partition in partitions}
        self._trained_ahead: dict[int, set[int]] = {partition: set() for partition in partitions}
        self._trained = dict.fromkeys(partitions, 0)

    def read(self, partition: int, offset: int, *, done: bool) -> None:
        """Record an event as read; one that is `done` at once is never trained on."""
        self._next[partition] = offset + 1
        if not done:
            self._open[partition][offset] = None
            self._untrained[partition][offset] = None

    def commit(self, partition: int, offset: int) -> None:
        """Record that a restart need not read the event again."""
        del self._open[partition][offset]

    def trained(self, partition: int, offset: int) -> None:
        """Record that the weights include the event."""
        self._untrained[partition].pop(offset, None)
        self._trained_ahead[partition].add(offset)

    def discard(self, partition: int, offset: int) -> None:
        """Record that the event will not be trained on."""
        self._open[partition].pop(offset, None)
        self._untrained[partition].pop(offset, None)

    def read_offsets(self) -> dict[int, int]:
        """Per partition, the offset after the last one read; 0 where nothing was."""
        return dict(self._next)

    def committed_offsets(self) -> dict[int, int]:
        """Per partition, the first offset that is not done."""
        # offsets are read in order, so the first open one (dicts keep order) is the smallest
        return {p: next(iter(self._open[p]), following) for p, following in self._next.items()}

    def trained_offsets(self) -> dict[int, int]:
        """Per partition, the offset after the last one trained on of which everything before is done."""
        for partition, ahead in self._trained_ahead.items():
            first = next(iter(self._untrained[partition]), self._next[partition])
            done = {offset for offset in ahead if offset < first}
            if done:
                self._trained[partition] = max(done) + 1
                ahead -= done
        return dict(self._trained)

    def snapshot(self) -> State:
        """Everything, per partition."""
        self.trained_offsets()
        state = State(values={"partitions": list(self._next)})
        for number in self._next:
            state.arrays[f"{number}.places"] = whole_numbers([self._next[number], self._trained[number]])
            state.arrays[f"{number}.open"] = whole_numbers(self._open[number])
            state.arrays[f"{number}.unlearned"] = whole_numbers(self._untrained[number])
            state.arrays[f"{number}.ahead"] = whole_numbers(sorted(self._trained_ahead[number]))
        return state

    def restore(self, state: State) -> None:
        """Return to the state of `snapshot`. Raises `ValueError` if the partitions differ."""
        if set(state.values["partitions"]) != set(self._next):
            raise ValueError(f"offsets are of partitions {state.values['partitions']}, not of {list(self._next)}")
        for number in self._next:
            self._next[number], self._trained[number] = state.arrays[f"{number}.places"].tolist()
            self._open[number] = dict.fromkeys(state.arrays[f"{number}.open"].tolist())
            self._untrained[number] = dict.fromkeys(state.arrays[f"{number}.unlearned"].tolist())
            self._trained_ahead[number] = set(state.arrays[f"{number}.ahead"].tolist())
