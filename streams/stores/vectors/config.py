"""Settings of Milvus. Apart from the client, whose import takes half a second that most commands do not need."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from streams.runtime.endpoints import checked_endpoint, shown_endpoint


class MilvusConfig(BaseModel):
    """How to reach Milvus, and where the vectors live in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    uri: str = "http://127.0.0.1:19530"
    """Address of the server. The default is the embedded stack's Milvus Lite."""
    token: SecretStr | None = None
    """`user:password` or an API key; never logged."""
    ssl_cafile: str | None = None
    """Certificate authority file for an `https://` address; the system's by default."""
    ssl_certfile: str | None = None
    """Certificate that this client shows, where the server asks for one; needs `ssl_cafile` and `ssl_keyfile`."""
    ssl_keyfile: str | None = None
    """Key of that certificate."""
    alias: str = Field(default="item_emb", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")
    """Alias of the collection in use. The collection itself is named after the encoder version of its vectors."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """How long one call may take."""
    consistency_level: Literal["Strong", "Bounded", "Session", "Eventually"] = "Bounded"
    """Consistency of searches, and of the items that the HTTP interface shows. `Strong` sees every acknowledged write,
    and waits for it: about 200 ms a call on a Milvus server, 400 ms at the median of `/v1/similar`. `Bounded` may
    miss the last seconds (the server's graceful time). `Session` and `Eventually` may miss more. What is read before a
    write, and what a score rests on, is always read as with `Strong`. Milvus Lite sees every write with each of them.
    """

    @field_validator("uri")
    @classmethod
    def _uri_reads_one_way(cls, uri: str) -> str:
        return checked_endpoint(uri, schemes=("http", "https", "tcp", "unix"))

    @model_validator(mode="after")
    def _files_go_together(self) -> Self:
        if (self.ssl_certfile or self.ssl_keyfile) and not (self.ssl_certfile and self.ssl_keyfile and self.ssl_cafile):
            raise ValueError("ssl_certfile, ssl_keyfile and ssl_cafile go together")
        if self.ssl_cafile and not self.uri.startswith("https://"):
            raise ValueError("ssl_cafile needs a uri with https://")
        return self

    def tls_options(self) -> dict[str, Any]:
        """The client's arguments for certificates."""
        if self.ssl_certfile:
            return {
                "secure": True,
                "ca_pem_path": self.ssl_cafile,
                "client_pem_path": self.ssl_certfile,
                "client_key_path": self.ssl_keyfile,
            }
        return {"secure": True, "server_pem_path": self.ssl_cafile} if self.ssl_cafile else {}

    @property
    def shown_uri(self) -> str:
        """The address without its login."""
        return shown_endpoint(self.uri)
