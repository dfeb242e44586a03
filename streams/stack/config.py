"""Configuration of the embedded stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_STACK = "default"


class StackConfig(BaseModel):
    """Where the embedded stack lives and how it is started."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data_folder: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "mimstream" / "stacks")
    """Holds one folder per stack. Default: `mimstream/stacks` in the user's data folder (`XDG_DATA_HOME`)."""
    cache_folder: Path = Field(default_factory=lambda: Path.home() / ".cache" / "mimstream")
    """Holds Kafka's jars, shared by all stacks. Default: `mimstream` in the user's cache folder (`XDG_CACHE_HOME`)."""
    kafka_jars: Path | None = None
    """A folder with the jars of Apache Kafka 4 (`libs` of its release archive); then nothing is fetched."""
    maven_repository: str | None = None
    """Base URL of another Maven repository for Kafka's jars, such as a company's mirror; Maven Central by default."""
    kafka_heap_mb: int = Field(default=256, ge=128)
    """Largest heap of Kafka's Java process, in MiB."""
    start_timeout_seconds: float = Field(default=90.0, gt=0)
    """How long one part may take until it answers; the first start on a slow disk takes longest."""


def folders_in(stack: Path) -> dict[str, dict[str, Any]]:
    """Nested settings that keep what is learned from a stack's log in the stack's folder, to go with it."""
    return {"models": {"folder": stack / "models"}, "train": {"state_folder": stack / "train"}}


NOWHERE_ELSE: dict[str, dict[str, Any]] = {
    "topics": dict.fromkeys(("replication_factor", "min_insync_replicas")),
    "kafka": {
        "security_protocol": "PLAINTEXT",
        **dict.fromkeys(("sasl_username", "sasl_password", "ssl_cafile", "ssl_certfile", "ssl_keyfile")),
    },
    "redis": dict.fromkeys(("username", "password", "ssl_cafile", "ssl_certfile", "ssl_keyfile")),
    "milvus": dict.fromkeys(("token", "ssl_cafile", "ssl_certfile", "ssl_keyfile")),
    "models": {"url": None, "storage_options": {}},
    "train": {"snapshot_folder": None},
}
"""What beside addresses belongs to another system, as nested settings: logins, certificates, replicas, other places for
models."""
