"""Impressions as discrete fields and as text, the two inputs of FLIP.

Letters: N rows, F fields, I items, W tokens of a row, S values in the text (the target's title and the latest titles).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trainer.offline.data import CtrData
from trainer.offline.neural.columns import numbers, seen_history

RECENT = 3
"""Number of latest history items, as fields and as titles."""
TARGET_TOKENS, RECENT_TOKENS = 16, 8
BINS = 10


@dataclass(frozen=True)
class TitleTokens:
    """The tokens of every item's title, and the special ones."""

    title_IW: NDArray[np.int64]
    """0-padded, `TARGET_TOKENS` wide."""
    first: int
    separator: int
    mask: int
    padding: int

    @staticmethod
    def of(titles: list[str], folder: Path) -> TitleTokens:
        """Tokenise titles with the tokenizer of a language model's folder."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(TARGET_TOKENS)
        known = tokenizer.get_vocab()
        first, separator, mask, padding = (known[each] for each in ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
        title_IW = np.full((len(titles), TARGET_TOKENS), padding, np.int64)
        for item, encoded in enumerate(tokenizer.encode_batch_fast(titles, add_special_tokens=False)):
            title_IW[item, : len(encoded.ids)] = encoded.ids
        return TitleTokens(title_IW, first, separator, mask, padding)

    def rows(self, target_N: NDArray[np.int64], recent_NR: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Token ids (N, W), 0-padded at the end, and the value each token belongs to (N, W); -1 for special ones.

        "[CLS] target [SEP] newest [SEP] ..."; a history shorter than `RECENT` gives fewer tokens.
        """
        count = len(target_N)
        pieces = [np.full((count, 1), self.first), self.title_IW[target_N]]
        values = [np.full((count, 1), -1), np.zeros((count, TARGET_TOKENS), np.int64)]
        for place in range(recent_NR.shape[1]):
            there_N1 = recent_NR[:, place : place + 1] > 0
            pieces.append(np.where(there_N1, self.separator, self.padding))
            values.append(np.full((count, 1), -1))
            pieces.append(np.where(there_N1, self.title_IW[recent_NR[:, place], :RECENT_TOKENS], self.padding))
            values.append(np.full((count, RECENT_TOKENS), place + 1))
        token_NW, value_NW = np.concatenate(pieces, axis=1), np.concatenate(values, axis=1)
        order_NW = np.argsort(token_NW == self.padding, axis=1, kind="stable")
        token_NW, value_NW = (np.take_along_axis(each, order_NW, axis=1) for each in (token_NW, value_NW))
        width = int((token_NW != self.padding).sum(1).max(initial=1))
        return token_NW[:, :width], np.where(token_NW == self.padding, -1, value_NW)[:, :width]

    def lengths(self, target_N: NDArray[np.int64], recent_NR: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of real tokens of each row of `rows`, shape (N,)."""
        real_IW = self.title_IW != self.padding
        latest_NR = (real_IW[:, :RECENT_TOKENS].sum(1)[recent_NR] + 1) * (recent_NR > 0)
        found_N: NDArray[np.int64] = 1 + real_IW.sum(1)[target_N] + latest_NR.sum(1)
        return found_N


@dataclass(frozen=True, eq=False)
class Fields:
    """The discrete values of a row: target, category, latest items, and each number's bin among quantiles."""

    edges_DB: NDArray[np.float32]
    items: int
    categories: int
    left_out: tuple[str, ...]

    @staticmethod
    def of(train: CtrData, left_out: tuple[str, ...]) -> Fields:
        """Quantiles of the training rows; `left_out` as in `ColumnBatches`."""
        dense_ND = numbers(train, left_out)
        edges_DB = np.quantile(dense_ND, np.linspace(0, 1, BINS + 1)[1:-1], axis=0).T.astype(np.float32)
        return Fields(edges_DB, len(train.items), int(train.items.category_I.max(initial=0)) + 1, left_out)

    @property
    def sizes(self) -> list[int]:
        """Number of values of each field."""
        return [self.items, self.categories, *[self.items] * RECENT, *[BINS] * len(self.edges_DB)]

    def codes(self, data: CtrData) -> NDArray[np.int64]:
        """Value of each field, shape (N, F), counted from 0 within the field."""
        target_N = data.rows.item_N
        dense_ND = numbers(data, self.left_out)
        bins = [np.searchsorted(edges_B, dense_ND[:, d], side="right") for d, edges_B in enumerate(self.edges_DB)]
        return np.stack([target_N, data.items.category_I[target_N], *recent(data).T, *bins], axis=1).astype(np.int64)


def recent(data: CtrData) -> NDArray[np.int64]:
    """The latest `RECENT` history items of each row, newest first, 0-padded; what was searched is the newest."""
    found_NL = seen_history(data, np.arange(len(data)), RECENT)[:, :RECENT]
    return np.pad(found_NL, ((0, 0), (0, RECENT - found_NL.shape[1])))
