"""Set-up that every test shares."""

import os

import pytest
import torch

# one thread per process: tests run beside each other on few cores, and results stay the same to the last digit
torch.set_num_threads(1)

REAL_PARTS = ("live", "faults")
MOST_WORKERS = 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, because tests of real parts wait; few on many cores: each starts its own parts."""
    return min((os.cpu_count() or 1) + 1, MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without real parts come first, so that a typo shows in seconds."""
    items.sort(key=lambda item: any(item.get_closest_marker(name) for name in REAL_PARTS))
