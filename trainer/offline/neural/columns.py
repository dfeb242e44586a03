"""Columns to batches: each distinct item of a batch has one row, without Python per row.

`trainer.networks.collate` makes the same layout online, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.networks.ciubm import CtrBatch
from trainer.networks.collate import with_query
from trainer.offline.data import CtrData, history_matrix
from trainer.offline.tabular import tabular

_LENGTH_SORTED_BATCHES = 16
"""Batches whose rows are sorted by history length together: less padding, and still near-random batches."""


class ColumnBatches:
    """Impressions as `CtrBatch`es. Rows of different encoder versions may share a batch, vectors never mix.

    An item in two versions has two rows in a batch, one per version. Not thread-safe: it uses a scratch array with an
    entry per (version, item), which finds distinct items faster than sorting does.

    `left_out`: prefixes of the names of features that the model must not read. Without `content` no vectors are
    gathered and `vectors_UV` is 0 wide.
    """

    def __init__(
        self,
        data: CtrData,
        *,
        history_length: int,
        left_out: tuple[str, ...] = (),
        content: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.data = data
        self.dense_NF = numbers(data, left_out)
        """The dense features of each row."""
        self._length = history_length
        self._device = device or torch.device("cpu")
        items = data.items
        versions, count = items.has_vector_EI.shape
        self._versions, self._count = versions, count
        self._vectors = items.vectors_EIV.reshape(versions * count, items.vectors_EIV.shape[2])
        if not content:
            self._vectors = self._vectors[:, :0]
        self._has_vector = items.has_vector_EI.reshape(-1)
        self._named = np.zeros(versions * count, np.bool_)
        self._place = np.zeros(versions * count, np.int64)
        rows = data.rows
        self._lengths_N = _lengths(data, history_length)
        self._labels_N = rows.label_N.astype(np.float32)
        self.group_N: NDArray[np.int64] = _numbered(rows.second_N, rows.user_N)
        """Number of the (second, user) of each row: the items shown to one user at one time."""

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: NDArray[np.int64]) -> CtrBatch:
        """These rows as tensors."""
        columns, items = self.data.rows, self.data.items
        target_B, history_BL = columns.item_N[rows], seen_history(self.data, rows, self._length)
        if self._versions > 1:
            offset_B = columns.encoder_N[rows] * self._count
            target_B += offset_B
            history_BL += np.where(history_BL > 0, offset_B[:, None], 0)
        self._named[target_B] = True
        self._named[history_BL] = True
        self._named[0] = True
        distinct_U = np.flatnonzero(self._named)
        self._named[distinct_U] = False
        self._place[distinct_U] = np.arange(len(distinct_U))
        target_B, history_BL = self._place[target_B], self._place[history_BL]
        item_U = distinct_U % self._count if self._versions > 1 else distinct_U
        batch = CtrBatch(
            hashes_U2=torch.from_numpy(items.hashes_I2[item_U]),
            vectors_UV=torch.from_numpy(self._vectors[distinct_U]),
            has_vector_U=torch.from_numpy(self._has_vector[distinct_U]),
            target_B=torch.from_numpy(target_B),
            history_BL=torch.from_numpy(history_BL),
            dense_BF=torch.from_numpy(self.dense_NF[rows]),
            category_U=torch.from_numpy(items.category_I[item_U]),
        )
        return batch if self._device.type == "cpu" else batch.to(self._device)

    def labels(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Labels of these rows, float32."""
        return torch.from_numpy(self._labels_N[rows]).to(self._device)

    def groups(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Number, from 0, of the (second, user) of each row of a batch, shape (len(rows),)."""
        _, group_B = np.unique(self.group_N[rows], return_inverse=True)
        return torch.from_numpy(group_B.reshape(-1)).to(self._device)

    def epoch(self, batch_rows: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Row numbers of one pass in batches, in random order; rows of one (second, user) stay together."""
        shuffled_N = np.argsort(rng.permutation(int(self.group_N.max(initial=-1)) + 1)[self.group_N], kind="stable")
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(shuffled_N), _LENGTH_SORTED_BATCHES * batch_rows):
            span = shuffled_N[start : start + _LENGTH_SORTED_BATCHES * batch_rows]
            span = span[np.argsort(self._lengths_N[span], kind="stable")]
            batches += np.split(span, range(batch_rows, len(span), batch_rows))
        for number in rng.permutation(len(batches)):
            yield batches[number]

    def in_order(self, batch_rows: int, among: NDArray[np.int64] | slice = slice(None)) -> Iterator[NDArray[np.int64]]:
        """Row numbers of one pass sorted by history length, for what does not depend on their order; all by default."""
        rows = np.arange(len(self))[among]
        by_length = rows[np.argsort(self._lengths_N[rows], kind="stable")]
        yield from np.split(by_length, range(batch_rows, len(by_length), batch_rows)) if len(by_length) else ()


def _numbered(second_N: NDArray[np.int64], user_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each distinct (second, user), in order, shape (N,)."""
    order_N = np.lexsort((user_N, second_N))
    later_N = order_N[1:], order_N[:-1]
    number_N = np.zeros(len(order_N), np.int64)
    changes = (second_N[later_N[0]] != second_N[later_N[1]]) | (user_N[later_N[0]] != user_N[later_N[1]])
    number_N[later_N[0]] = np.cumsum(changes)
    return number_N


def seen_history(data: CtrData, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """What models see as the histories of these rows, newest first, 0-padded, as a live trainer makes it.

    A trigger item is the newest of the `length` items; what was searched stands before them and takes no place of one.
    """
    history_BL = history_matrix(data, rows, length)
    if data.rows.trigger_N is not None:
        history_BL = with_query(history_BL, data.rows.trigger_N[rows])[:, :length]
    return history_BL if data.rows.query_N is None else with_query(history_BL, data.rows.query_N[rows])


def _lengths(data: CtrData, length: int) -> NDArray[np.int64]:
    """Number of items and queries in each row's `seen_history`."""
    rows = data.rows
    lengths_N = np.minimum(data.histories.lengths(rows.history_start_N, rows.history_stop_N), length)
    if rows.trigger_N is not None:
        lengths_N = np.minimum(lengths_N + (rows.trigger_N > 0), length)
    return lengths_N if rows.query_N is None else lengths_N + (rows.query_N > 0)


def numbers(data: CtrData, left_out: tuple[str, ...] = ()) -> NDArray[np.float32]:
    """The tabular features without those left out, shape (N, at most F + A)."""
    columns_NF, names = tabular(data)
    chosen = [place for place, name in enumerate(names) if not name.startswith(left_out or ("\0",))]
    return columns_NF if len(chosen) == len(names) else np.ascontiguousarray(columns_NF[:, chosen])
