"""What every test of the item path begins with."""

from __future__ import annotations

import pytest

from tests.factories.item_path import ItemPath


@pytest.fixture
def path() -> ItemPath:
    return ItemPath()
