"""Settings of `mimstream serve`; apart from its code, so that reading settings imports no HTTP server."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, SecretStr, field_validator

MIN_TOKEN_CHARACTERS = 16


class VectorCacheConfig(BaseModel):
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


KindName = Literal["click", "cart", "purchase"]


class ServeConfig(BaseModel):
    """`mimstream serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` in a container, with `tokens`."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one, which `serve.ready` names."""
    tokens: tuple[SecretStr, ...] = ()
    """Bearer tokens, as `["one", "another"]`: who gives one of them may ask. With two, one can be replaced at a time.
    Empty: no authentication. `/healthz` and `/readyz` need none."""
    max_requests_per_second: float | None = Field(default=None, gt=0)
    """How often one client may ask on average; a client is a token, or else an address. None: as often as it likes."""
    burst_requests: int = Field(default=100, ge=1)
    """Requests that a client may send at once after a pause."""
    head_seconds: float = Field(default=10.0, gt=0)
    """How long the head of a request may take to arrive, from its first byte."""
    body_seconds: float = Field(default=10.0, gt=0)
    """How long the body of a request may take to arrive."""
    max_body_bytes: int = Field(default=12_582_912, ge=1_024)
    """Largest request body, unpacked. A picture to search with takes a third more in it than itself, as base64;
    `mimstream check` compares with `MIM_ENCODER__MAX_IMAGE_BYTES`."""
    max_connections: int = Field(default=1_000, ge=1)
    """Connections open at once. For one more, the one that has waited longest for a request is closed."""
    max_concurrent_requests: int = Field(default=256, ge=1)
    """Requests in hand at once; more are answered 503 at once rather than late."""
    compute_threads: int = Field(default=2, ge=1)
    """Threads that encode queries."""
    query_cache: int = Field(default=10_000, ge=1)
    """Searches whose vectors are kept; those not asked for longest go first."""
    query_deadline_ms: float = Field(default=200.0, ge=0, le=60_000)
    """How long a score waits for the vector of what was searched, in milliseconds from the request's arrival; then it
    answers without (`"query": "not_in_time"`). The vector is there for the next request."""
    max_waiting_queries: int = Field(default=32, ge=1)
    """Searches that are encoded or wait for it at once. One more is scored without its search, at once."""
    score_threads: int = Field(default=2, ge=1)
    """Threads in which the click model runs while several requests are in hand. The rest of a score is the work of one
    thread, about as much again: more than three cores want more processes."""
    poll_models_seconds: float = Field(default=2.0, gt=0)
    """How often to look for a newer release; a notice on `models` makes it look at once."""
    load_encoder_at_start: bool = False
    """Load the encoder before the first text or picture is asked about, rather than then."""
    kind_weights: dict[KindName, FiniteFloat] = Field(default_factory=dict)
    """What the kinds of takes count in `score`, the sum of their probabilities with these weights, as JSON:
    `{"click": 1, "cart": 3, "purchase": 10}`, where a click stands for any take. Empty: answers have no `score`."""
    skew_share: float = Field(default=0.05, ge=0, le=1)
    """Share of requests of which up to 4 rows are logged to the topic `skew` (features, items and times of the history,
    answers; no user), at most ten a second; only at states of which the trainer says that it compares."""
    ready_timeout_seconds: float = Field(default=2.0, gt=0)
    """How long `/readyz` waits for each store."""
    cache: VectorCacheConfig = Field(default_factory=VectorCacheConfig)
    """The cache of vectors."""

    @field_validator("tokens")
    @classmethod
    def _tokens_are_long(cls, tokens: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(token.get_secret_value()) < MIN_TOKEN_CHARACTERS for token in tokens):
            raise ValueError(f"a token needs at least {MIN_TOKEN_CHARACTERS} characters")
        return tokens
