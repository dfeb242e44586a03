"""Optional packages: looked for before the work that needs them, not after."""

from __future__ import annotations

from importlib.util import find_spec

from schemas.errors import Misconfigured

PACKAGES = {"sklearn": "scikit-learn", "peft": "peft", "s3fs": "s3fs", "fuxictr": "fuxictr"}
"""The distribution of each module that no plain installation has."""


def require_package(module: str, needed_by: str) -> None:
    """Raise `Misconfigured` if a module is not installed."""
    if find_spec(module) is None:
        raise Misconfigured(f"{needed_by} needs {PACKAGES[module]}: pip install {PACKAGES[module]}")
