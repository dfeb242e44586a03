"""Stable hashes of item ids, by which `IdTable` looks them up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def id_hashes(identifier: str) -> tuple[int, int]:
    """Two independent non-negative 63-bit hashes of an id, the same in every process and release."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=16).digest()
    first = int.from_bytes(digest[:8], "little") >> 1
    second = int.from_bytes(digest[8:], "little") >> 1
    return first, second


def hash_columns(identifiers: Sequence[str]) -> NDArray[np.int64]:
    """`id_hashes` of many ids, shape (n, 2)."""
    digests = b"".join([hashlib.blake2b(each.encode(), digest_size=16).digest() for each in identifiers])
    return (np.frombuffer(digests, "<u8") >> np.uint64(1)).astype(np.int64).reshape(-1, 2)
