"""What commands printed."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """What was printed since the last call, of both streams; the first one as JSON if so asked."""

    def read(*, as_json: bool = False) -> Any:
        out, _ = capsys.readouterr()
        return json.loads(out) if as_json else out

    return read
