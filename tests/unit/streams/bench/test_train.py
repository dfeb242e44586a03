from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import Misconfigured
from streams.bench.train import fuxictr_seconds, read_log, write_log
from trainer.offline.data import history_matrix


def test_both_sides_of_the_benchmark_see_the_same_histories(tmp_path: Path) -> None:
    write_log(tmp_path, rows=40, history=6, rng=np.random.default_rng(0))
    data = read_log(tmp_path)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    users = pq.read_table(tmp_path / "users.parquet")["full_item_seq"].to_pylist()
    found = history_matrix(data, np.arange(40), 6)
    for row in range(40):
        expected = users[rows["user_index"][row]][: rows["seq_len"][row]][::-1]
        assert [item for item in found[row].tolist() if item] == expected
    assert data.rows.item_N.tolist() == rows["item_index"] and data.rows.label_N.tolist() == rows["label"]


def test_without_fuxictr_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fuxictr.features", None)
    with pytest.raises(Misconfigured, match=r"pip install 'fuxictr"):
        fuxictr_seconds(tmp_path, 6, 8)
