"""What rows of a folder see of searches, as the rows of a live trainer do.

Letters: N rows, Q queries, I items, T words of a title or of a search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.datasets.folder import DataSet
from trainer.datasets.queries import Queries
from trainer.samples.searches import QUERY_COLUMNS, is_hidden, query_columns, words_of_searches

_ROWS_PER_PASS = 32_768
_ITEMS_AT_ONCE = 4_096


def seen_queries(
    queries: Queries,
    search_N: NDArray[np.int64],
    user_N: NDArray[np.int64],
    second_N: NDArray[np.int64],
    user_ids: Sequence[str],
) -> NDArray[np.int64]:
    """The query of each row, 0 for none and for one that is hidden from the rows of a user's second."""
    query_N = queries.numbers(search_N)
    asked = np.flatnonzero(query_N)
    order = asked[np.lexsort((second_N[asked], user_N[asked]))]
    user_A, second_A = user_N[order], second_N[order]
    changes_A = np.append(True, (user_A[1:] != user_A[:-1]) | (second_A[1:] != second_A[:-1]))[: len(order)]
    moments = zip(user_A[changes_A].tolist(), second_A[changes_A].tolist(), strict=True)
    hidden_M = np.array([is_hidden(user_ids[user], second) for user, second in moments], bool)
    query_N[order[hidden_M[np.cumsum(changes_A) - 1]]] = 0
    return query_N


def searched_columns(
    queries: Queries, data: DataSet, query_N: NDArray[np.int64], item_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """`QUERY_COLUMNS` of rows of these queries and items, shape (N, 4)."""
    words_QT = words_of_searches(["", *queries.texts])
    title_IT = np.concatenate([words_of_searches([""]), *_title_words(data)])
    out = np.zeros((len(query_N), len(QUERY_COLUMNS)), np.float32)
    asked = np.flatnonzero(query_N)
    for start in range(0, len(asked), _ROWS_PER_PASS):
        rows = asked[start : start + _ROWS_PER_PASS]
        words_BT = words_QT[query_N[rows] - queries.items]
        out[rows] = query_columns(np.ones(len(rows), bool), words_BT, title_IT[item_N[rows]])
    return out


def _title_words(data: DataSet) -> list[NDArray[np.uint32]]:
    starts = range(0, len(data.item_ids), _ITEMS_AT_ONCE)
    return [words_of_searches([one.title for one in data.records(start, start + _ITEMS_AT_ONCE)]) for start in starts]
