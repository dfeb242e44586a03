"""What a data-set folder teaches where users search: anchors, negatives, and what the reports ask."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streams.encoder_training.csft import PairData
from streams.encoder_training.folder_pairs import folder_pairs
from tests.factories.csft import features_of, make_fusion
from tests.factories.offline_folders import START, write
from trainer.csft.config import CsftConfig
from trainer.csft.pairs import AnchorKind
from trainer.csft.run import learn, padded
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog

ITEMS, ROWS = 10, 400
CONFIG = CsftConfig(batch_pairs=16, epochs=8, hard_negatives=False, learning_rate=1e-2, history_length=5)


def pairs_of(folder: Path, **columns: Any) -> PairData:
    """Every user takes one item, after a search where `columns` say so; the last two items are held out."""
    held_out = [number >= ITEMS - 2 for number in range(ITEMS)]
    names = [f"i{number}" for number in range(ITEMS)]
    write(folder, "items", item_id=names, title=names, publish_ts=[START] * ITEMS, cold_holdout=held_out)
    item = np.random.default_rng(0).integers(0, ITEMS, ROWS)
    write(folder, "interactions", user_id=[f"u{row}" for row in range(ROWS)], item_id=[names[one] for one in item],
          ts=[START + 10 * row for row in range(ROWS)], label=[1] * ROWS,
          **{name: make(item) for name, make in columns.items()})  # fmt: skip
    log = BehaviourLog.of(open_data_set(folder, attributes=("cold_holdout",)), folder)
    builder: Any = SimpleNamespace(features=features_of)
    return folder_pairs(log, builder, CONFIG, with_test=True)


def words(item: np.ndarray) -> list[str | None]:
    return [f"find {one}" for one in item]


def photos(item: np.ndarray) -> list[bytes | None]:
    return [b"photo of %d" % one for one in item]


@pytest.mark.parametrize(("columns", "kind"), [
    ({"query_text": words}, AnchorKind.QUERY_TEXT),
    ({"query_image": photos}, AnchorKind.QUERY_IMAGE),
    ({"query_text": words, "query_image": photos}, AnchorKind.QUERY_IMAGE),
])  # fmt: skip
def test_takes_after_a_search_teach_though_the_user_has_no_past_and_are_judged(
    tmp_path: Path, columns: dict[str, Any], kind: AnchorKind
) -> None:
    data = pairs_of(tmp_path, **columns)
    assert {pair.anchor_kind for pair in data.learned} == {kind}
    assert data.counts["anchors"][kind.value] == len(data.learned) > 100
    assert data.counts["no_pair"]["no_anchor"] == data.counts["unreadable_queries"] == 0
    assert data.counts["no_pair"]["item_not_learned"] > 20
    queries = ITEMS * len(columns)
    assert len(data.contents) == len(data.features) == ITEMS + queries and len(data.fit_features) == ITEMS
    assert data.usable.tolist() == [False, *[True] * (ITEMS - 2), False, False, *[False] * queries]
    fusion = make_fusion(data.fit_features)
    items = padded(fusion, data.features)
    before = data.reports(fusion, fusion.embed(items), None)
    run = learn(CONFIG, fusion, items, data.numbers, data.learned, usable=data.usable)
    reports = data.reports(fusion, fusion.embed(items), run.last)
    name = kind.value
    for span, share in (("validation", 0.1), ("test", 0.2)):
        trained, first = reports[span]["trained"], before[span]["trained"]
        assert trained[name]["questions"] == round(share * ROWS)  # held-out items are asked for too
        assert 0 < trained[name]["cold_questions"] < trained[name]["questions"]
        assert trained[f"{name}_at_1"]["all"] > 0.7 > first[f"{name}_at_1"]["all"]
        assert reports[span]["popularity"][name]["k"] == 50 and f"{name}_at_5" in reports[span]["frozen"]


def test_a_folder_without_searches_asks_as_it_did(tmp_path: Path) -> None:
    data = pairs_of(tmp_path)
    assert data.counts["anchors"] == {"query_image": 0, "query_text": 0, "trigger_item": 0} and not data.learned
    assert data.counts["no_pair"]["no_anchor"] > 100 and len(data.contents) == ITEMS


def test_the_item_looked_at_just_before_is_an_anchor(tmp_path: Path) -> None:
    data = pairs_of(tmp_path, trigger_item=lambda item: ["i0" if one != 0 else None for one in item])
    assert {pair.anchor_kind for pair in data.learned} == {AnchorKind.TRIGGER_ITEM}
    assert {pair.anchor for pair in data.learned} == {(1,)} and len(data.learned) > 100
