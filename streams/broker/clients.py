"""Kafka clients: one configuration, three clients, one translation of their errors."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import aiokafka.client
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import errors as aio_errors
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.metadata import MetadataRequest
from kafka import KafkaAdminClient
from kafka import errors as kp_errors
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from schemas.errors import BrokerUnavailable, Fenced, Misconfigured
from streams.broker.header_names import accept_any_names


class BrokerConfig(BaseModel):
    """How to reach Kafka."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    bootstrap_servers: str = "127.0.0.1:19092"
    """Comma-separated `host:port` list. The default is the embedded stack's broker."""
    client_id: str = "mimstream"
    """Name under which brokers log, measure and limit this client; by default `mimstream-` and the command."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Transport security."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """SASL mechanism, where `security_protocol` needs one."""
    sasl_username: str | None = None
    """SASL user."""
    sasl_password: SecretStr | None = None
    """SASL password; never logged."""
    ssl_cafile: str | None = None
    """Certificate authority file; the system's by default."""
    ssl_certfile: str | None = None
    """Certificate of this client, where the broker requires one."""
    ssl_keyfile: str | None = None
    """Key of that certificate."""
    request_timeout_ms: int = Field(default=20_000, ge=1_000)
    """How long one request to the broker may take."""
    connect_timeout_ms: int = Field(default=10_000, ge=500)
    """How long to wait for a first broker to answer."""
    max_record_bytes: int = Field(default=12_582_912, ge=1_024)
    """Largest record that is produced or accepted, in bytes. A picture inside a record takes a third more than itself.
    The topics must take as much (`max.message.bytes`), and their memory follows from it; `mimstream check` compares."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers_carry_no_login(cls, servers: str) -> str:
        if "@" in servers or "/" in servers:
            raise ValueError(
                "host:port, separated by commas, without a scheme or a login: those are MIM_KAFKA__SECURITY_PROTOCOL, "
                "MIM_KAFKA__SASL_USERNAME and MIM_KAFKA__SASL_PASSWORD"
            )
        return servers

    def client_options(self) -> dict[str, Any]:
        """Options that aiokafka and kafka-python share."""
        never_create_topics()
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
            "request_timeout_ms": self.request_timeout_ms,
        }
        if "SASL" in self.security_protocol:
            if self.sasl_username is None or self.sasl_password is None:
                raise Misconfigured(
                    f"MIM_KAFKA__SECURITY_PROTOCOL={self.security_protocol} needs MIM_KAFKA__SASL_USERNAME and "
                    "MIM_KAFKA__SASL_PASSWORD"
                )
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password.get_secret_value(),
            }
        if "SSL" in self.security_protocol:
            options["ssl_context"] = self._ssl_context()
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context: ssl.SSLContext = create_ssl_context(
                cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
            )
        except (OSError, ssl.SSLError) as error:
            raise Misconfigured(
                f"MIM_KAFKA__SSL_CAFILE, MIM_KAFKA__SSL_CERTFILE or MIM_KAFKA__SSL_KEYFILE cannot be used: {error}"
            ) from None
        return context


def never_create_topics() -> None:
    """Let no aiokafka client of this process create a topic by naming it, as brokers otherwise do by default.

    A topic made so has the broker's partitions and is not compacted. Calling it again changes nothing.
    """
    aiokafka.client.MetadataRequest = partial(MetadataRequest, allow_auto_topic_creation=False)


def make_producer(config: BrokerConfig, **overrides: Any) -> AIOKafkaProducer:
    """An idempotent producer that waits for all replicas. Start it inside the running loop."""
    options: dict[str, Any] = {
        "enable_idempotence": True,
        "acks": "all",
        "compression_type": "lz4",
        "linger_ms": 5,
        "max_batch_size": 262_144,
        "max_request_size": config.max_record_bytes + 65_536,
    }
    return AIOKafkaProducer(**config.client_options(), **(options | overrides))


def make_consumer(config: BrokerConfig, *topics: str, **overrides: Any) -> AIOKafkaConsumer:
    """A consumer of raw bytes that never commits by itself. Start it inside the running loop."""
    accept_any_names()
    options: dict[str, Any] = {
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "max_partition_fetch_bytes": config.max_record_bytes + 65_536,
        "isolation_level": "read_committed",
    }
    return AIOKafkaConsumer(*topics, **config.client_options(), **(options | overrides))


def make_admin(config: BrokerConfig) -> KafkaAdminClient:
    """An administration client (blocking: call it from a thread or a command)."""
    with broker_errors(config):
        return KafkaAdminClient(**config.client_options(), bootstrap_timeout_ms=config.connect_timeout_ms)


def _of_connections(config: BrokerConfig) -> str:
    """The settings that may be wrong where there is no connection: clients say the same of a refused handshake."""
    names = ["BOOTSTRAP_SERVERS", "SECURITY_PROTOCOL"]
    names += ["SSL_CAFILE", "SSL_CERTFILE"] if "SSL" in config.security_protocol.removeprefix("SASL_") else []
    names += ["SASL_USERNAME", "SASL_PASSWORD"] if "SASL" in config.security_protocol else []
    return ", ".join(f"MIM_KAFKA__{name}" for name in names)


_FENCED = (
    aio_errors.ProducerFenced,
    aio_errors.TransactionCoordinatorFenced,
    aio_errors.InvalidProducerIdMapping,  # the transactional id expired, and has another producer id since
)

_NO_ANSWER = (
    aio_errors.KafkaConnectionError,
    # aiokafka does not mark it as retriable: raised once retriable errors have lasted for `request_timeout_ms`
    aio_errors.KafkaTimeoutError,
    kp_errors.KafkaConnectionError,
    kp_errors.KafkaTimeoutError,
)

_DENIED = (
    aio_errors.TopicAuthorizationFailedError,
    aio_errors.GroupAuthorizationFailedError,
    aio_errors.ClusterAuthorizationFailedError,
    aio_errors.TransactionalIdAuthorizationFailed,
    aio_errors.AuthenticationFailedError,
    aio_errors.SaslAuthenticationFailed,
    aio_errors.UnsupportedSaslMechanismError,
    aio_errors.IllegalSaslStateError,
    kp_errors.AuthorizationError,
    kp_errors.SaslAuthenticationFailedError,
    kp_errors.UnsupportedSaslMechanismError,
    kp_errors.IllegalSaslStateError,
)

_TOPIC_REFUSED = (
    aio_errors.InvalidReplicationFactorError,
    aio_errors.PolicyViolationError,
    kp_errors.InvalidReplicationFactorError,
    kp_errors.PolicyViolationError,
)


class RecordTooLarge(Misconfigured):
    """A topic does not take a record that the settings allow."""


@contextmanager
def broker_errors(config: BrokerConfig) -> Iterator[None]:
    """Translate the clients' errors.

    Errors that pass by waiting become `BrokerUnavailable`, a takeover `Fenced`, and what the cluster does not allow
    `Misconfigured`.
    """
    try:
        yield
    except _FENCED as error:
        raise Fenced(f"another process took over this role in Kafka ({type(error).__name__})") from error
    except _NO_ANSWER as error:
        raise BrokerUnavailable(
            "Kafka", f"no connection to {config.bootstrap_servers} ({_of_connections(config)}): {error}"
        ) from error
    except _DENIED as error:
        raise Misconfigured(
            f"Kafka at {config.bootstrap_servers} refuses: {error} (MIM_KAFKA__SASL_USERNAME, "
            "MIM_KAFKA__SASL_PASSWORD, MIM_KAFKA__SASL_MECHANISM, or the rights listed in deploy/README.md)"
        ) from error
    except aio_errors.MessageSizeTooLargeError as error:
        raise RecordTooLarge(
            f"Kafka at {config.bootstrap_servers} refuses a record for its size: a topic takes less than "
            f"MIM_KAFKA__MAX_RECORD_BYTES={config.max_record_bytes}; 'mimstream check' names the topic ({error})"
        ) from error
    except _TOPIC_REFUSED as error:
        raise Misconfigured(
            f"Kafka at {config.bootstrap_servers} refuses: {error} (MIM_TOPICS__REPLICATION_FACTOR, or the cluster's "
            "own rules; 'mimstream topics list' shows what is needed)"
        ) from error
    except (aio_errors.KafkaError, kp_errors.KafkaError) as error:
        if isinstance(error.__cause__, _FENCED):  # aiokafka wraps what it does not expect
            raise Fenced("another process took over this role in Kafka") from error
        if getattr(error, "retriable", False):
            raise BrokerUnavailable("Kafka", f"{config.bootstrap_servers}: {error!r}") from error
        raise
