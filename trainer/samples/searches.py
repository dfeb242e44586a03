"""Searches beside items: the number of a search in the catalogue, and the words that searches and titles share.

Letters: B rows, T words of a title or of a search.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from enum import Enum, auto
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from schemas.queries import query_id

MOST_WORDS = 16
"""Words of a title and of a search that are compared."""
HIDDEN_OF = 20
QUERY_COLUMNS = ("query known", "query words found", "title words found", "query is title")
"""Names of the columns of `query_columns`."""

_WORD = re.compile(r"\w+")
_PREFIX = "\0query:"  # no id of an item holds a control character


class SearchUse(Enum):
    """What rows keep of the searches that led to them."""

    NOTHING = auto()
    RAW = auto()
    """Words and photo, as C-SFT learns from them."""
    NUMBERED = auto()
    """The words, and a number in the catalogue, which has the vector."""


def query_item(query: str) -> str:
    """The name that a query has among items: a search is numbered, waited for and kept as they are."""
    return f"{_PREFIX}{query}"


def is_query(item_id: str) -> bool:
    """Whether a name is that of a query."""
    return item_id.startswith(_PREFIX)


def searched(text: str | None, image: bytes | None) -> str | None:
    """The name of a search among items; None where nothing was searched."""
    query = query_id(text, image)
    return None if query is None else query_item(query)


def is_hidden(user_id: str, second: int) -> bool:
    """Whether what a user searched in this second is hidden from training, one of `HIDDEN_OF`: rows of searches whose
    vector a server cannot get in time look like this.
    """
    return zlib.crc32(f"{second}\0{user_id}".encode()) % HIDDEN_OF == 0


@lru_cache(65_536)
def hashed_words(text: str | None) -> tuple[int, ...]:
    """Hashes of the first distinct words of a text, in any case, never 0."""
    words = dict.fromkeys(zlib.crc32(word.encode()) or 1 for word in _WORD.findall((text or "").lower()))
    return tuple(words)[:MOST_WORDS]


def words_of_searches(texts: Sequence[str | None]) -> NDArray[np.uint32]:
    """`hashed_words` of each text, shape (B, T), 0 pads."""
    words_BT = np.zeros((len(texts), MOST_WORDS), np.uint32)
    for place, text in enumerate(texts):
        words = hashed_words(text)
        words_BT[place, : len(words)] = words
    return words_BT


def query_columns(
    known_B: NDArray[np.bool_], words_BT: NDArray[np.uint32], title_BT: NDArray[np.uint32]
) -> NDArray[np.float32]:
    """What a network reads of searches beside their vectors, shape (B, 4), zero for a row without a search.

    The share of the search's words in the title, the share of the title's words in the search, and whether they are the
    same words. A single row of `words_BT` is the search of all rows.
    """
    if not known_B.any():
        return np.zeros((len(title_BT), len(QUERY_COLUMNS)), np.float32)
    words_TB, title_TB = _filled(words_BT).T.copy(), _filled(title_BT).T.copy()  # rows last: numpy then sums at once
    word_TB, of_title_TB = words_TB > 0, title_TB > 0
    same_TTB = (words_TB[:, None] == title_TB) & word_TB[:, None]
    found_B = same_TTB.any(1).sum(0) / np.maximum(word_TB.sum(0), 1)
    title_B = same_TTB.any(0).sum(0) / np.maximum(of_title_TB.sum(0), 1)
    columns = np.stack([np.ones(len(title_BT)), found_B, title_B, (found_B == 1) & (title_B == 1)], axis=1)
    return (columns * known_B[:, None]).astype(np.float32)


def _filled(words_BT: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Without the last columns that no row fills."""
    return words_BT[:, : int(np.count_nonzero(words_BT.any(0)))]
