"""Folders that cannot be written, in words: which one, why, and which setting moves it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from schemas.errors import Misconfigured
from streams.runtime.setting_names import leaves_of

OF_FILES = frozenset(
    {
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    }
)
"""Errors of the file system that somebody has to mend; others are faults of ours and keep their traceback."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NEARLY_NOTHING = 1 << 20


def file_refusal(error: OSError, settings: BaseModel | None) -> Misconfigured:
    """What to tell of a file that could not be used. `settings` are those in force, if they could be read."""
    folders = dict(_folders(settings)) if settings is not None else {}
    path = Path(str(error.filename)) if error.filename is not None else None
    if path is not None:
        named = [name for name, folder in folders.items() if path.is_relative_to(folder)]
        place = str(path)
    else:  # a write does not say where
        named = [name for name, folder in folders.items() if error.errno in _FULL and _is_full(folder)]
        place = ", ".join(str(folders[name]) for name in named) or "a file"
    way_out = "make room there" if error.errno in _FULL else "make it writable"
    setting = f", or set {' or '.join(named)} to another folder" if named else ""
    return Misconfigured(f"{place}: {error.strerror or error}; {way_out}{setting} (--log-level debug: where)")


def _folders(settings: BaseModel) -> Iterator[tuple[str, Path]]:
    for leaf in leaves_of(type(settings)):
        value: object = settings
        for name in leaf.path:
            value = getattr(value, name)
        if isinstance(value, Path):
            yield leaf.variable, value.expanduser().absolute()


def _is_full(folder: Path) -> bool:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return existing is not None and shutil.disk_usage(existing).free < _NEARLY_NOTHING
