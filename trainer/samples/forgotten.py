"""Users who asked to be forgotten, and the offsets of the click log below which their events are erased."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from schemas.forgotten import ForgottenUser


class ForgottenUsers:
    """Which records of one click log are to be treated as if they were never sent. Stores hashes, not ids."""

    def __init__(self, cluster_id: str | None, topic_id: str | None) -> None:
        self._log = (cluster_id, topic_id)
        self._ends: dict[bytes, dict[int, int]] = {}

    def add(self, user: ForgottenUser) -> bool:
        """Add a request; False if it concerns another log, or erases nothing new."""
        if (user.cluster_id, user.topic_id) != self._log:
            return False
        known = self._ends.setdefault(_key(user.user_id), {})
        later = {partition: end for partition, end in user.ends.items() if end > known.get(partition, 0)}
        known |= later
        return bool(later)

    def erases(self, user_id: str, partition: int, offset: int) -> bool:
        """Whether this record of the user is erased."""
        ends = self._ends.get(_key(user_id)) if self._ends else None
        return ends is not None and offset < ends.get(partition, 0)

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Everything, as JSON values."""
        return {key.hex(): {str(number): end for number, end in ends.items()} for key, ends in self._ends.items()}

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Add the requests of a `snapshot`."""
        for key, ends in state.items():
            self._ends[bytes.fromhex(key)] = {int(number): end for number, end in ends.items()}

    def __len__(self) -> int:
        return len(self._ends)


def _key(user_id: str) -> bytes:
    return blake2b(user_id.encode(), digest_size=16).digest()
