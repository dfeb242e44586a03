"""Lists of partners: with which other items each item was taken, a fixed number of them.

A pair that is in the list counts on. One that is not takes a free place; in a full list at most one of the new pairs
that are counted together replaces the entry with the smallest count, and starts at its own count. Were several replaced
at once, one user with a long history would empty a list.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.features.states import TakeRows

_MOST = np.iinfo(np.uint16).max


def count_pairs(rows: TakeRows, slot_K: NDArray[np.int64], partner_K: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Count pairs of a step in the lists of `slot_K`; the order of the pairs does not matter. Returns the slots."""
    keys, count_Q = np.unique((slot_K.astype(np.uint64) << np.uint64(32)) | partner_K, return_counts=True)
    slot_Q, partner_Q = (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFF_FFFF)).astype(np.uint32)
    match_QP = rows.partner_UP[slot_Q] == partner_Q[:, None]
    place_Q = match_QP.argmax(axis=1)
    old = np.flatnonzero(match_QP[np.arange(len(slot_Q)), place_Q])
    slot, place = slot_Q[old], place_Q[old]
    rows.together_UP[slot, place] = np.minimum(rows.together_UP[slot, place] + count_Q[old], _MOST)
    new = np.ones(len(slot_Q), bool)
    new[old] = False
    _insert(rows, slot_Q[new], partner_Q[new], count_Q[new])
    return np.unique(slot_Q)


def _insert(
    rows: TakeRows, slot_K: NDArray[np.int64], partner_K: NDArray[np.uint32], count_K: NDArray[np.int64]
) -> None:
    """New partners: the most counted first, then by a mixed hash, so that no item is preferred everywhere."""
    count_K = np.minimum(count_K, _MOST)
    mixed_K = _mixed(partner_K, slot_K)
    order = np.argsort((slot_K << 32) | ((_MOST - count_K) << 16) | mixed_K, kind="stable")
    slot_K, partner_K, count_K = slot_K[order], partner_K[order], count_K[order]
    slot_S, first_S, number_K = np.unique(slot_K, return_index=True, return_inverse=True)
    rank_K = np.arange(len(slot_K)) - first_S[number_K]
    used_SP = rows.together_UP[slot_S] > 0
    free_S = used_SP.shape[1] - np.count_nonzero(used_SP, axis=1)
    open_S = np.flatnonzero(free_S)
    fits = np.flatnonzero(rank_K < free_S[number_K])
    number_S = np.zeros(len(slot_S), np.int64)
    number_S[open_S] = np.arange(len(open_S))
    place = np.argsort(used_SP[open_S], axis=1, kind="stable")[number_S[number_K[fits]], rank_K[fits]]
    rows.partner_UP[slot_K[fits], place], rows.together_UP[slot_K[fits], place] = partner_K[fits], count_K[fits]
    one_more = np.flatnonzero(rank_K == free_S[number_K])
    slot = slot_K[one_more]
    # among equal counts a hash decides which one goes, always the same: what stays has time to be counted again
    rank_KP = _mixed(rows.partner_UP[slot], slot[:, None]) | (rows.together_UP[slot].astype(np.uint32) << np.uint32(16))
    place = rank_KP.argmin(axis=1)
    rows.partner_UP[slot, place], rows.together_UP[slot, place] = partner_K[one_more], count_K[one_more]


def _mixed(partner: NDArray[np.uint32], slot: NDArray[np.int64]) -> NDArray[np.uint32]:
    """16 bits for a partner in a list, as good as random."""
    return ((partner ^ (slot.astype(np.uint32) * np.uint32(0x85EB_CA6B))) * np.uint32(0x9E37_79B1)) >> np.uint32(16)
