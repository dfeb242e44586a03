"""Embeddings of an open set of ids: a table of fixed size that admits recurring ids and evicts the longest unseen.

A click stream brings new ids without end, so a table row per id grows without bound, and a plain hash makes unrelated
ids share rows. Here an id gets a row of its own once it has occurred often enough, and loses it to another when it is
the longest unseen. Ids without a row read a shared one, which is trained to represent an unknown item; the content
tells new items apart.

Source: count filter and expiry of Monolith's collision-free table (arXiv 2209.07663, section 2.2); the sketch of counts
that halves as in TinyLFU (arXiv 1512.00727). Unlike Monolith's cuckoo map the table is set-associative: its size is
fixed at the start, and every lookup and admission is a handful of tensor operations.

Letters: U distinct ids of a batch, S sets, W ways of a set, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WAYS = 8
_FREE = -1


class IdTable(nn.Module):
    """Row 0 is shared by all ids without a row of their own; `admit` assigns the other `capacity` rows.

    The id of each row, the counts and the clock are buffers: `state_dict` is the snapshot, and a released model looks
    ids up exactly as its trainer did. Memory never grows.
    """

    key_SW: Tensor
    seen_SW: Tensor
    counts: Tensor
    number_W: Tensor
    counted: Tensor
    clock: Tensor

    def __init__(self, capacity: int, width: int, *, admit_after: int, std: float = 0.05) -> None:
        super().__init__()
        if capacity % _WAYS:
            raise ValueError(f"capacity is {capacity}, expected a multiple of {_WAYS}")
        self.capacity = capacity
        self.admit_after = admit_after
        self.embedding = nn.Embedding(capacity + 1, width, sparse=True)
        nn.init.normal_(self.embedding.weight, std=std)
        sets = capacity // _WAYS
        self.register_buffer("key_SW", torch.full((sets, _WAYS), _FREE, dtype=torch.int64))
        self.register_buffer("seen_SW", torch.full((sets, _WAYS), _FREE, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(4 * capacity, dtype=torch.int32))
        self.register_buffer("number_W", torch.arange(1.0, _WAYS + 1), persistent=False)
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))

    def forward(self, hashes_U2: Tensor) -> Tensor:
        """Embeddings, shape (U, E). Changes no state."""
        ids_UE: Tensor = self.embedding(self.rows(hashes_U2))
        return ids_UE

    def rows(self, hashes_U2: Tensor) -> Tensor:
        """Row of each id, shape (U,); 0 for those that have none. `hashes_U2`: two independent hashes of the id."""
        set_U = hashes_U2[:, 0] % self.key_SW.shape[0]
        match_UW = self.key_SW.index_select(0, set_U) == hashes_U2[:, 1:]
        # at most one way matches, so a product gives its number: a tenth of the time of any and argmax
        way_U = (match_UW.float() @ self.number_W).long()
        return (set_U * _WAYS + way_U) * (way_U > 0)

    @property
    def admitted(self) -> int:
        """How many ids have a row."""
        return int((self.key_SW != _FREE).sum())

    @torch.no_grad()
    def admit(self, hashes_U2: Tensor) -> Tensor:
        """Count each id once, admit those counted in `admit_after` calls; returns the reassigned rows.

        A new row starts as a copy of the shared one, so that admission by itself changes no score. A full set evicts
        its longest unseen id, but none of this call. The caller clears the optimiser's state of the rows returned.
        """
        self.clock += 1
        row_U = self.rows(hashes_U2)
        known_U = row_U > 0
        self.seen_SW.view(-1)[row_U[known_U].sub_(1)] = self.clock
        new_N2 = hashes_U2[~known_U]
        new_N2 = _distinct(new_N2[new_N2.any(1)])  # padding is no id
        frequent_N2 = new_N2[self._count(new_N2) >= self.admit_after]
        if not len(frequent_N2):
            return row_U.new_empty(0)
        set_N, order_N = torch.sort(frequent_N2[:, 0] % len(self.key_SW), stable=True)
        key_N = frequent_N2[order_N, 1]
        first_N = torch.searchsorted(set_N, set_N)
        rank_N = torch.arange(len(set_N), device=set_N.device) - first_N  # how many of this call want the same set
        oldest_NW = self.seen_SW[set_N].argsort(dim=1, stable=True)
        way_N = oldest_NW.gather(1, rank_N.clamp(max=_WAYS - 1)[:, None]).squeeze(1)
        place_N = set_N * _WAYS + way_N
        free_N = (rank_N < _WAYS) & (self.seen_SW.view(-1)[place_N] < self.clock)
        place_N, key_N = place_N[free_N], key_N[free_N]
        self.key_SW.view(-1)[place_N] = key_N
        self.seen_SW.view(-1)[place_N] = self.clock
        self.embedding.weight[place_N + 1] = self.embedding.weight[0].clone()
        return place_N + 1

    def _count(self, hashes_N2: Tensor) -> Tensor:
        """Count each id once more and return its count so far: the smaller of its two cells."""
        cell_N2 = torch.stack([hashes_N2[:, 0], hashes_N2[:, 1]], 1) % len(self.counts)
        self.counts.index_add_(0, cell_N2.reshape(-1), torch.ones_like(cell_N2.reshape(-1), dtype=torch.int32))
        named_N = self.counts[cell_N2].amin(1)
        self.counted += len(hashes_N2)
        if self.counted >= self.capacity:  # old counts decay, and cells do not fill up
            self.counts //= 2
            self.counted.zero_()
        return named_N


def _distinct(hashes_N2: Tensor) -> Tensor:
    """Each id once: a batch contains an item once per encoder version."""
    hashes_N2 = hashes_N2[hashes_N2[:, 0].argsort(stable=True)]
    first_N = torch.ones(len(hashes_N2), dtype=torch.bool, device=hashes_N2.device)
    first_N[1:] = (hashes_N2[1:] != hashes_N2[:-1]).any(1)
    return hashes_N2[first_N]
