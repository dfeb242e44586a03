"""SHA-256 over files, to identify weights and bundles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Hex digest of one file's bytes. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(folder: Path, names: Sequence[str]) -> str:
    """One hex digest over several files of a folder, names included, whatever the order of `names`."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
    return total.hexdigest()
