"""What the collaborators of the item path keep among themselves."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from streams.indexing import context
from tests.factories.item_path import ItemPath


async def test_of_many_attributes_that_look_like_outcomes_no_more_than_a_few_are_reported_and_remembered(
    path: ItemPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_MOST_REPORTED", 2)
    names = ["rating", "avg_rating", "sales", "units_sold"]
    with capture_logs() as logs:
        await path.index_all(path.publish("a", title="one", attributes=dict.fromkeys(names, 1.0)))
    told = [line["attribute"] for line in logs if line["log_level"] == "warning"]
    assert len(told) == 2 and path.context.reported == set(told) <= set(names)
    assert set(path.rows["a"].attributes) == set(names)  # what is not reported is kept all the same
