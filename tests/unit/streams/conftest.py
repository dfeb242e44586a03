"""What tests of the command line share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings from outside, and no logging left behind: commands configure it for their process."""
    for name in list(os.environ):
        if name.startswith("MIM_") and name != "MIM_TEST_DATA":
            monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
