"""What a worker makes of the partitions that it is given, and of records that lie in others than they should."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from streams.broker.partitioning import home_partition
from streams.broker.topics import TopicsConfig
from streams.indexing.app import assignment_error
from streams.indexing.config import IndexConfig, PartitioningReport
from streams.monitoring.metrics import Metrics
from tests.factories.item_path import ItemPath, item
from tests.factories.running_agent import running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def given(items: list[int], retries: list[int], of: tuple[int, int]) -> str | None:
    error = assignment_error(
        TopicsConfig(), {"items": items, "items-retry": retries}, {"items": of[0], "items-retry": of[1]}
    )
    return None if error is None else str(error)


def test_partitions_that_go_together_are_no_error() -> None:
    assert given([0, 2], [0, 2], (4, 4)) is None
    assert given([], [], (4, 4)) is None


def test_topics_of_different_width_are_named_with_the_command_that_widens_the_narrow_one() -> None:
    wider_items, wider_retries = given([0, 1], [0], (6, 4)), given([0], [0], (4, 6))
    assert wider_items is not None and "--topic mim.items-retry --partitions 6" in wider_items
    assert wider_retries is not None and "--topic mim.items --partitions 6" in wider_retries


def test_an_assignment_of_before_the_topics_were_widened_asks_for_another_start() -> None:
    text = given([0, 1, 2], [0, 1], (3, 3))
    assert text is not None and "left the group" in text


async def test_records_away_from_home_are_counted_and_told_once(tmp_path: Path) -> None:
    path = ItemPath(config=IndexConfig(batch_within_seconds=0.05))
    names = [f"i{n}" for n in range(20)]
    home = sum(home_partition(name.encode(), 4) == 0 for name in names)
    with capture_logs() as logs:
        async with running("items", path, tmp_path, partitions=4) as run:
            for name in names:
                await run.put(name, item(name, title="x"))
            await run.until(lambda: len(run.acked) == len(names))
    reports = [one for one in run.reports if isinstance(one, PartitioningReport)]
    assert (sum(one.home for one in reports), sum(one.foreign for one in reports)) == (home, len(names) - home)
    assert sum(line["event"] == "items.foreign_partition" for line in logs) == 1
    metrics = Metrics("index")
    for report in reports:
        metrics.record(report)
    assert f'mim_index_placed_total{{partition="foreign"}} {len(names) - home}.0' in metrics.page().decode()
