"""What can be set of `mimstream serve`; apart from its code, so that reading settings costs nobody an HTTP server."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RepresentationsConfig(BaseModel):
    """The cache of vectors in a serving process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_items: int = Field(default=200_000, ge=1)
    """Vectors held at most; those not asked for longest go first."""
    max_staleness_seconds: float = Field(default=5.0, gt=0)
    """How long, at most, a score may still rest on a vector after the center announced its replacement or delete."""
    absent_seconds: float = Field(default=1.0, ge=0)
    """How long it is remembered that the center does not hold an item."""
    warm_up: bool = False
    """Fill the cache at start by reading `embeddings` from its beginning."""


class ServeConfig(BaseModel):
    """`mimstream serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` in a container. There is no authentication: put a gateway in front."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one, which `serve.ready` names."""
    max_body_bytes: int = Field(default=8_388_608, ge=1_024)
    """Largest request body (a picture to search with arrives in base64)."""
    max_concurrent_requests: int = Field(default=256, ge=1)
    """Requests in hand at once; more are answered 503 at once rather than late."""
    compute_threads: int = Field(default=2, ge=1)
    """Threads that score and encode queries."""
    poll_models_seconds: float = Field(default=2.0, gt=0)
    """How often to look for a newer release; a notice on `models` makes it look at once."""
    load_encoder_at_start: bool = False
    """Load the encoder before the first text or picture is asked about, rather than then."""
    ready_timeout_seconds: float = Field(default=2.0, gt=0)
    """How long `/readyz` waits for each store."""
    cache: RepresentationsConfig = Field(default_factory=RepresentationsConfig)
    """The cache of vectors."""
