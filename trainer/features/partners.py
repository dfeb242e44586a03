"""Lists of partners: with which other items each item was taken, a fixed number of them.

A pair that is in the list counts on. One that is not takes a free place; in a full list at most one of the new pairs
that are counted together replaces the entry with the smallest count, and starts at its own count. Were several replaced
at once, one user with a long history would empty a list.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.features.states import TakeRows, firsts

_MOST = np.iinfo(np.uint16).max


def count_pairs(rows: TakeRows, slot_K: NDArray[np.int64], partner_K: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Count pairs of a step in the lists of `slot_K`; the order of the pairs does not matter. Returns the slots."""
    keys = np.sort((slot_K.astype(np.uint64) << np.uint64(32)) | partner_K)
    first_Q = np.flatnonzero(firsts(keys))
    keys, count_Q = keys[first_Q], np.diff(first_Q, append=len(keys))
    slot_Q, partner_Q = (keys >> np.uint64(32)).astype(np.int64), keys.astype(np.uint32)
    match_QP = rows.partner_UP.take(slot_Q, axis=0) == partner_Q[:, None]
    place_Q = match_QP.argmax(axis=1)
    old = np.flatnonzero(match_QP.take(np.arange(0, match_QP.size, match_QP.shape[1]) + place_Q))
    slot, place = slot_Q[old], place_Q[old]
    rows.together_UP[slot, place] = np.minimum(rows.together_UP[slot, place] + count_Q[old], _MOST)
    new = np.ones(len(slot_Q), bool)
    new[old] = False
    _insert(rows, slot_Q[new], partner_Q[new], count_Q[new])
    return slot_Q[firsts(slot_Q)]


def _insert(
    rows: TakeRows, slot_K: NDArray[np.int64], partner_K: NDArray[np.uint32], count_K: NDArray[np.int64]
) -> None:
    """New partners: the most counted first, then by a mixed hash, so that no item is preferred everywhere.

    Pairs come in order of their slots, then of their partners.
    """
    count_K = np.minimum(count_K, _MOST)
    rank_K = (slot_K << 32) | ((_MOST - count_K) << 16) | _mixed(partner_K, slot_K)
    order = np.argsort(rank_K)
    if not np.diff(rank_K[order]).all():
        order = np.argsort(rank_K, kind="stable")
    slot_K, partner_K, count_K = slot_K[order], partner_K[order], count_K[order]
    first_S = np.flatnonzero(firsts(slot_K))
    slot_S, size_S = slot_K[first_S], np.diff(first_S, append=len(slot_K))
    rank_K = np.arange(len(slot_K)) - np.repeat(first_S, size_S)
    is_free_SP = rows.together_UP.take(slot_S, axis=0) == 0
    free = np.flatnonzero(is_free_SP) % is_free_SP.shape[1]
    free_S = np.count_nonzero(is_free_SP, axis=1)
    free_K, end_K = np.repeat(free_S, size_S), np.repeat(np.cumsum(free_S), size_S)
    fits = np.flatnonzero(rank_K < free_K)
    place = free[(end_K - free_K + rank_K)[fits]]
    rows.partner_UP[slot_K[fits], place], rows.together_UP[slot_K[fits], place] = partner_K[fits], count_K[fits]
    one_more = np.flatnonzero(rank_K == free_K)
    slot = slot_K[one_more]
    # among equal counts a hash decides which one goes, always the same: what stays has time to be counted again
    rank_KP = _mixed(rows.partner_UP.take(slot, axis=0), slot[:, None])
    rank_KP |= rows.together_UP.take(slot, axis=0).astype(np.uint32) << np.uint32(16)
    place = rank_KP.argmin(axis=1)
    rows.partner_UP[slot, place], rows.together_UP[slot, place] = partner_K[one_more], count_K[one_more]


def _mixed(partner: NDArray[np.uint32], slot: NDArray[np.int64]) -> NDArray[np.uint32]:
    """16 bits for a partner in a list, as good as random."""
    return ((partner ^ (slot.astype(np.uint32) * np.uint32(0x85EB_CA6B))) * np.uint32(0x9E37_79B1)) >> np.uint32(16)
