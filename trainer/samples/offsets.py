"""Which offsets of the click log are done with, so that a reader knows from where nothing is owed any more."""

from __future__ import annotations

from collections.abc import Collection

from trainer.state import State, whole_numbers


class OffsetTracker:
    """Per partition: what was read and is not settled yet, and how far everything is.

    `next_to_read` says where reading stands, `settled_below` from where nothing is owed any more. `learned_below` says
    the same of what was learned from, and is a matter of the rows alone: of what was read ahead it knows nothing.
    """

    def __init__(self, partitions: Collection[int]) -> None:
        self._next = dict.fromkeys(partitions, 0)
        self._open: dict[int, dict[int, None]] = {partition: {} for partition in partitions}
        self._unlearned: dict[int, dict[int, None]] = {partition: {} for partition in partitions}
        self._learned_ahead: dict[int, set[int]] = {partition: set() for partition in partitions}
        self._learned = dict.fromkeys(partitions, 0)

    def read(self, partition: int, offset: int, *, settled: bool) -> None:
        """An event was read; what is settled at once is not learned from."""
        self._next[partition] = offset + 1
        if not settled:
            self._open[partition][offset] = None
            self._unlearned[partition][offset] = None

    def settle(self, partition: int, offset: int) -> None:
        """Nothing is owed for this event any more."""
        del self._open[partition][offset]

    def learned(self, partition: int, offset: int) -> None:
        """The event has become part of what the weights stand on."""
        self._unlearned[partition].pop(offset, None)
        self._learned_ahead[partition].add(offset)

    def discard(self, partition: int, offset: int) -> None:
        """The event will never be learned from."""
        self._open[partition].pop(offset, None)
        self._unlearned[partition].pop(offset, None)

    def next_to_read(self) -> dict[int, int]:
        """Per partition, the offset after the last one read; 0 where nothing was."""
        return dict(self._next)

    def settled_below(self) -> dict[int, int]:
        """Per partition, the first offset that is not settled."""
        # offsets are read in order, so the first open one (dicts keep order) is the smallest
        return {p: next(iter(self._open[p]), following) for p, following in self._next.items()}

    def learned_below(self) -> dict[int, int]:
        """Per partition, the offset after the last one learned from of which everything before is done with."""
        for partition, ahead in self._learned_ahead.items():
            first = next(iter(self._unlearned[partition]), self._next[partition])
            done = {offset for offset in ahead if offset < first}
            if done:
                self._learned[partition] = max(done) + 1
                ahead -= done
        return dict(self._learned)

    def snapshot(self) -> State:
        """Everything, per partition."""
        self.learned_below()
        state = State(values={"partitions": list(self._next)})
        for number in self._next:
            state.arrays[f"{number}.places"] = whole_numbers([self._next[number], self._learned[number]])
            state.arrays[f"{number}.open"] = whole_numbers(self._open[number])
            state.arrays[f"{number}.unlearned"] = whole_numbers(self._unlearned[number])
            state.arrays[f"{number}.ahead"] = whole_numbers(sorted(self._learned_ahead[number]))
        return state

    def restore(self, state: State) -> None:
        """Stand where `snapshot` was taken. Raises `ValueError` if the partitions are others."""
        if set(state.values["partitions"]) != set(self._next):
            raise ValueError(f"offsets are of partitions {state.values['partitions']}, not of {list(self._next)}")
        for number in self._next:
            self._next[number], self._learned[number] = state.arrays[f"{number}.places"].tolist()
            self._open[number] = dict.fromkeys(state.arrays[f"{number}.open"].tolist())
            self._unlearned[number] = dict.fromkeys(state.arrays[f"{number}.unlearned"].tolist())
            self._learned_ahead[number] = set(state.arrays[f"{number}.ahead"].tolist())
