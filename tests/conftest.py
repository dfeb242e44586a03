"""Set-up that every test shares."""

import os
from collections import deque
from collections.abc import Iterator
from itertools import chain, groupby

import pytest
import torch

from streams.settings import load_settings
from streams.stack.run import RunningStack, running_stack
from tests.factories.fork_server import ForkServer

# one thread per process: tests run beside each other on few cores, and results stay the same to the last digit
torch.set_num_threads(1)

REAL_PARTS = ("live", "faults")
MOST_WORKERS = 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, because tests of real parts wait; few on many cores: each starts its own parts."""
    return min((os.cpu_count() or 1) + 1, MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests without real parts come first, so that a typo shows in seconds.

    Of several workers each has both kinds in turns: tests of real parts wait for much of their time, while others
    compute. Those without come last, because they are short and leave no worker behind at the end.
    """
    real, others = [], []
    for item in items:
        (real if any(item.get_closest_marker(name) for name in REAL_PARTS) else others).append(item)
    items[:] = [*others, *real]
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        shares = [in_turns(part(real, share, workers), part(others, share, workers)) for share in range(workers)]
        items[:] = [item for share in shares for item in share]


def part(items: list[pytest.Item], share: int, shares: int) -> list[pytest.Item]:
    """One of equal parts of a list, as `--dist worksteal` deals out the whole."""
    return items[len(items) * share // shares : len(items) * (share + 1) // shares]


def in_turns(real: list[pytest.Item], others: list[pytest.Item]) -> list[pytest.Item]:
    """Files of tests of real parts between the files of the others, spread over the first half of them.

    Files stay whole: what a file sets up for all its tests is set up once.
    """
    merged: list[pytest.Item] = []
    files = deque(list(file) for _, file in groupby(real, key=lambda item: item.path))
    seen = placed = 0
    for _, file in groupby(others, key=lambda item: item.path):
        merged += (tests := list(file))
        seen += len(tests)
        while files and placed / len(real) < 2 * seen / len(others):
            placed += len(files[0])
            merged += files.popleft()
    return [*merged, *chain.from_iterable(files)]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """One stack for all live tests; whoever kills a part waits until it is back."""
    with running_stack(tmp_path_factory.mktemp("stack"), load_settings().stack) as running:
        yield running


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """The interpreter that forks `mimstream` processes."""
    with ForkServer() as server:
        yield server
