"""Where Milvus is. Apart from the client, whose import takes half a second that most commands need not pay."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class MilvusConfig(BaseModel):
    """How to reach Milvus, and where the vectors live in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    uri: str = "http://127.0.0.1:19530"
    """Address of the server. The default is the embedded stack's Milvus Lite."""
    token: SecretStr | None = None
    """`user:password` or an API key; never logged."""
    alias: str = Field(default="item_emb", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")
    """Alias of the collection in use. The collection itself is named after the encoder version of its vectors."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """How long one call may take."""
    consistency_level: Literal["Strong", "Bounded", "Session", "Eventually"] = "Strong"
    """Consistency of searches. Point reads are always strong: ordering depends on them."""
