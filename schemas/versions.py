"""Schema versions: each message states its own, and readers reject unknown ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

KNOWN_VERSIONS = (1,)


def _known(version: int) -> int:
    if version not in KNOWN_VERSIONS:
        raise PydanticCustomError(
            "unknown_version",
            "schema version {version} is not known here (known: {known}); upgrade the reader first",
            {"version": version, "known": ", ".join(map(str, KNOWN_VERSIONS))},
        )
    return version


SchemaVersion = Annotated[int, AfterValidator(_known)]
