"""Set-up that every test shares."""

import os
from collections.abc import Iterator

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
    return min((os.cpu_count() or 1) + 2, MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests without real parts come first, so that a typo shows in seconds.

    Of several workers the last one begins with the others, which wait for much of their time while the rest computes.
    """
    items.sort(key=lambda item: any(item.get_closest_marker(name) for name in REAL_PARTS))
    real = sum(any(item.get_closest_marker(name) for name in REAL_PARTS) for item in items)
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    last_share = len(items) - -(-len(items) // workers)  # where it begins, as `--dist worksteal` deals them out
    if workers > 1 and last_share + real <= len(items):
        items[last_share:] = items[len(items) - real :] + items[last_share : len(items) - real]


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
