"""Where released models are. Apart from the store, so that reading settings stays quick."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

NEW_STORE = "an empty MIM_MODELS__FOLDER (or another MIM_MODELS__URL, where that is set)"
"""How messages ask for a place without releases."""

_BUCKET = re.compile(r"s3://([A-Za-z0-9._-]+|arn:aws[^/@]*:s3[^@]*)(/|$)")


class ModelStoreConfig(BaseModel):
    """Where released models are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    folder: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "mimstream" / "models")
    """The folder of releases; trainer and servers see the same one. Its file system must honour locks and renames. With
    the embedded stack (--stack, or MIM_KAFKA__BOOTSTRAP_SERVERS not set): `models` in the stack's folder."""
    url: str | None = Field(default=None, pattern=r"^(s3|memory)://.+")
    """An object store instead of the folder: `s3://bucket/prefix` (extra `s3`)."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options of s3fs for it, as JSON: `{"endpoint_url": ...}` for a store that only speaks S3's protocol. Leave
    credentials to where AWS's own tools look for them."""
    timeout_seconds: float = Field(default=20.0, gt=0)
    """How long an object store may take to answer a request, a second attempt included."""
    keep_releases: int = Field(default=10, ge=2)
    """How many of the newest releases are kept, refused ones included; the current one and its parent are kept in any
    case."""
    grace_seconds: float = Field(default=600.0, ge=0)
    """A release is kept at least this long after its successor was made, for readers that are about to load it."""
    lock_timeout_seconds: float = Field(default=20.0, gt=0)
    """How long a promotion waits for another one on the same folder."""

    @field_validator("url")
    @classmethod
    def _bucket_carries_no_login(cls, url: str | None) -> str | None:
        if url is not None and url.startswith("s3://") and not _BUCKET.match(url):
            raise ValueError(
                "s3:// is followed by a bucket's name or ARN alone; keys belong where AWS's own tools look for them "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a profile)"
            )
        return url
