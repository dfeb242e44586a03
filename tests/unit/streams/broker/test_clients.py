"""What Kafka's clients raise, in the words of this system."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as aio_errors
from aiokafka.consumer import fetcher
from aiokafka.producer.message_accumulator import MessageAccumulator
from aiokafka.record.memory_records import MemoryRecords
from kafka import errors as kp_errors

from schemas.errors import BrokerUnavailable, Fenced, Misconfigured
from streams.broker import clients
from streams.broker.clients import BrokerConfig, RecordTooLarge, broker_errors

CONFIG = BrokerConfig(bootstrap_servers="kafka-1:9093")
PARTITION = TopicPartition("t", 0)


class NotReady(fetcher.Fetcher):  # type: ignore[misc]
    """The client's own asking for offsets, in a cluster whose nodes are not ready."""

    def __init__(self) -> None:
        self._retry_backoff = 0.001
        self._client = SimpleNamespace(force_metadata_update=lambda: None)

    async def _proc_offset_requests(self, timestamps: object) -> dict[object, object]:
        raise aio_errors.NodeNotReadyError


async def test_offsets_that_nobody_told_in_time_may_be_asked_for_again() -> None:
    for ask in (NotReady().end_offsets, NotReady().beginning_offsets):
        with pytest.raises(BrokerUnavailable, match="kafka-1:9093"), broker_errors(CONFIG):
            await ask([PARTITION], 20)


async def test_a_record_that_found_no_room_in_time_may_be_sent_again() -> None:
    records = MessageAccumulator(None, 100, 0, 30)
    await records.add_message(PARTITION, b"k", b"v" * 60, timeout=0.02)  # nobody takes it away
    with pytest.raises(BrokerUnavailable, match="kafka-1:9093"), broker_errors(CONFIG):
        await records.add_message(PARTITION, b"k", b"v" * 60, timeout=0.02)


@pytest.mark.parametrize(
    "error",
    [
        aio_errors.TopicAuthorizationFailedError("items"),
        aio_errors.GroupAuthorizationFailedError("mim.index"),
        aio_errors.ClusterAuthorizationFailedError(),
        aio_errors.TransactionalIdAuthorizationFailed("mim.train"),
        aio_errors.SaslAuthenticationFailed("no such user"),
        aio_errors.UnsupportedSaslMechanismError("PLAIN"),
        kp_errors.TopicAuthorizationFailedError("items"),
        kp_errors.GroupAuthorizationFailedError("mim.index"),
        kp_errors.ClusterAuthorizationFailedError(),
        kp_errors.TransactionalIdAuthorizationFailedError("mim.train"),
        kp_errors.SaslAuthenticationFailedError("no such user"),
        kp_errors.UnsupportedSaslMechanismError("PLAIN"),
    ],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)
def test_a_refused_login_or_right_is_a_setting_to_mend(error: Exception) -> None:
    with pytest.raises(Misconfigured) as caught, broker_errors(CONFIG):
        raise error
    for word in ("kafka-1:9093", type(error).__name__, "MIM_KAFKA__SASL_USERNAME", "deploy/README.md"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["InvalidReplicationFactorError", "PolicyViolationError"])
def test_a_topic_that_the_cluster_does_not_take_is_a_setting_to_mend(name: str) -> None:
    for client in (aio_errors, kp_errors):
        with pytest.raises(Misconfigured, match=rf"{name}.*MIM_TOPICS__REPLICATION_FACTOR"), broker_errors(CONFIG):
            raise getattr(client, name)("larger than available brokers: 1")


def test_where_there_is_a_login_silence_may_be_its_refusal() -> None:
    error = aio_errors.KafkaConnectionError("Unable to bootstrap")
    for config, named in ((CONFIG, False), (BrokerConfig(security_protocol="SASL_SSL"), True)):
        with pytest.raises(BrokerUnavailable) as caught, broker_errors(config):
            raise error
        assert ("MIM_KAFKA__SASL_USERNAME" in str(caught.value)) is named


@pytest.mark.parametrize(
    ("protocol", "settings"),
    [
        ("PLAINTEXT", ""),
        ("SSL", "SSL_CAFILE, SSL_CERTFILE"),
        ("SASL_PLAINTEXT", "SASL_USERNAME, SASL_PASSWORD"),
        ("SASL_SSL", "SSL_CAFILE, SSL_CERTFILE, SASL_USERNAME, SASL_PASSWORD"),
    ],
)
def test_without_a_connection_those_settings_are_named_that_may_be_wrong(protocol: str, settings: str) -> None:
    config = BrokerConfig.model_validate({"security_protocol": protocol})
    names = ["BOOTSTRAP_SERVERS", "SECURITY_PROTOCOL", *filter(None, settings.split(", "))]
    told = re.escape("(" + ", ".join(f"MIM_KAFKA__{name}" for name in names) + ")")
    for error in (aio_errors.KafkaConnectionError("x"), kp_errors.KafkaTimeoutError("x")):
        with pytest.raises(BrokerUnavailable, match=told), broker_errors(config):
            raise error


@pytest.mark.parametrize("client", [aio_errors, kp_errors], ids=["aiokafka", "kafka-python"])
def test_what_passes_by_waiting_is_told_apart_from_what_does_not(client: Any) -> None:
    with pytest.raises(BrokerUnavailable, match="kafka-1:9093"), broker_errors(CONFIG):
        raise client.NotLeaderForPartitionError("moved")
    with pytest.raises(client.InvalidTopicError), broker_errors(CONFIG):
        raise client.InvalidTopicError("x")


def test_a_coordinator_that_was_replaced_is_a_takeover() -> None:
    with pytest.raises(Fenced), broker_errors(CONFIG):
        raise aio_errors.TransactionCoordinatorFenced("x")


@pytest.mark.parametrize(
    "login", [{}, {"sasl_username": "me"}, {"sasl_password": "secret"}], ids=lambda one: ",".join(one)
)
def test_a_login_that_is_not_whole_is_refused_by_its_settings(login: dict[str, str]) -> None:
    config = BrokerConfig.model_validate({"security_protocol": "SASL_PLAINTEXT", **login})
    with pytest.raises(
        Misconfigured, match=r"SASL_PLAINTEXT needs MIM_KAFKA__SASL_USERNAME and MIM_KAFKA__SASL_PASSWORD"
    ):
        config.client_options()
    plain = BrokerConfig.model_validate(login)
    assert "sasl_mechanism" not in plain.client_options()


def test_clients_lose_and_double_nothing_unless_they_are_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AIOKafkaProducer", "AIOKafkaConsumer"):
        monkeypatch.setattr(clients, name, lambda *topics, **options: (topics, options))
    config = BrokerConfig(max_record_bytes=5_000, client_id="me")
    made: Any = clients.make_producer(config, linger_ms=0)
    _, options = made
    assert (options["enable_idempotence"], options["acks"], options["linger_ms"]) == (True, "all", 0)
    assert (options["max_request_size"], options["client_id"]) == (5_000 + 65_536, "me")
    made = clients.make_consumer(config, "a", "b", auto_offset_reset="latest")
    topics, options = made
    assert (topics, options["enable_auto_commit"], options["auto_offset_reset"]) == (("a", "b"), False, "latest")
    assert options["max_partition_fetch_bytes"] == 5_000 + 65_536
    made = clients.make_consumer(config)
    assert (made[1]["auto_offset_reset"], made[1]["isolation_level"]) == ("none", "read_committed")


def test_clients_pass_names_of_headers_that_are_no_text_and_wait_for_a_broker_as_long_as_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", MemoryRecords)
    monkeypatch.setattr(clients, "AIOKafkaConsumer", lambda *topics, **options: None)
    monkeypatch.setattr(clients, "KafkaAdminClient", lambda **options: options)
    config = BrokerConfig(connect_timeout_ms=900, request_timeout_ms=7_000)
    clients.make_consumer(config)
    assert fetcher.MemoryRecords is not MemoryRecords
    options: Any = clients.make_admin(config)
    assert (options["bootstrap_timeout_ms"], options["request_timeout_ms"]) == (900, 7_000)


def test_what_is_told_apart_by_callers_stays_what_it_is() -> None:
    for error in (aio_errors.OffsetOutOfRangeError({}), kp_errors.TopicAlreadyExistsError()):
        with pytest.raises(type(error)), broker_errors(CONFIG):
            raise error


def test_a_record_that_a_topic_refuses_for_its_size_names_the_setting_and_the_way_to_the_topic() -> None:
    told = r"MIM_KAFKA__MAX_RECORD_BYTES=12582912.*mimstream check"
    with pytest.raises(RecordTooLarge, match=told), broker_errors(CONFIG):
        raise aio_errors.MessageSizeTooLargeError


def test_without_tls_and_login_clients_get_no_options_of_them() -> None:
    options = BrokerConfig(bootstrap_servers="a:1,b:2", request_timeout_ms=7_000).client_options()
    assert options == {
        "bootstrap_servers": ["a:1", "b:2"],
        "client_id": "mimstream",
        "security_protocol": "PLAINTEXT",
        "request_timeout_ms": 7_000,
    }
