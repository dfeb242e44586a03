"""The embedded stack: started through the real command, killed, and back with its data."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic
from pymilvus import DataType, MilvusClient

from schemas.errors import Misconfigured, Unavailable
from streams.settings import load_settings
from streams.stack.config import StackConfig
from streams.stack.folder import ProcessId
from streams.stack.parts import PartName
from streams.stack.run import RunningStack, running_stack
from tests.factories.fork_server import ForkServer
from tests.factories.waiting import wait_until

ROWS = 600
PARTS: tuple[PartName, ...] = ("kafka", "valkey", "milvus")


class Traces:
    """Something written to each part of a stack, and read back."""

    def __init__(self, endpoints: dict[str, dict[str, str]], name: str) -> None:
        self.servers = endpoints["kafka"]["bootstrap_servers"]
        self.uri = endpoints["milvus"]["uri"]
        self.redis = redis.Redis.from_url(endpoints["redis"]["url"])
        self.name = name

    def leave(self) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        admin.create_topics([NewTopic(self.name, 1, 1)])
        admin.close()
        producer = KafkaProducer(bootstrap_servers=self.servers, acks="all")
        for future in [producer.send(self.name, b"%d" % number) for number in range(100)]:
            future.get(timeout=30)
        producer.close()

        for number in range(100):
            self.redis.set(f"{self.name}:{number}", number)
        # the append-only file is written before the answer and synced once a second; a kill -9 loses neither
        client = MilvusClient(uri=self.uri, timeout=30)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=32)
        schema.add_field("emb", DataType.FLOAT_VECTOR, dim=4)
        index = client.prepare_index_params()
        index.add_index("emb", index_type="HNSW", metric_type="IP", params={"M": 16, "efConstruction": 64})
        client.create_collection(self.name, schema=schema, index_params=index)
        rows = [{"id": str(number), "emb": [1.0, number / ROWS, 0.0, 0.0]} for number in range(ROWS)]
        client.upsert(self.name, rows[: ROWS // 2])
        client.flush(self.name)  # half in a segment with its index, half in the log
        client.upsert(self.name, rows[ROWS // 2 :])
        client.close()

    def check(self) -> None:
        consumer = KafkaConsumer(bootstrap_servers=self.servers, auto_offset_reset="earliest", enable_auto_commit=False)
        consumer.assign([TopicPartition(self.name, 0)])
        values: list[bytes] = []
        deadline = time.monotonic() + 30
        while len(values) < 100 and time.monotonic() < deadline:
            for records in consumer.poll(timeout_ms=1000).values():
                values += [record.value for record in records]
        consumer.close()
        assert values == [b"%d" % number for number in range(100)]

        assert [int(self.redis.get(f"{self.name}:{number}")) for number in range(100)] == list(range(100))  # type: ignore[arg-type]

        client = MilvusClient(uri=self.uri, timeout=30)
        client.load_collection(self.name)
        found = client.get(self.name, ids=[str(number) for number in range(ROWS)], output_fields=["id"])
        assert {row["id"] for row in found} == {str(number) for number in range(ROWS)}
        nearest = client.search(self.name, data=[[0.0, 1.0, 0.0, 0.0]], limit=1)
        assert nearest[0][0]["id"] == str(ROWS - 1)
        client.close()


LeaveTraces = Callable[[dict[str, dict[str, str]], str], Traces]


class Mimstream:
    """The real command with folders of its own; every stack it started is taken down afterwards."""

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self.folder = folder
        self._fork_server = fork_server
        self.names: set[str] = set()

    def __call__(self, *arguments: str, ok: bool = True, **environment: str) -> str:
        done = self.result(*arguments, **environment)
        assert (done.returncode == 0) is ok, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr if not ok else done.stdout

    def result(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        if "--name" in arguments:
            self.names.add(arguments[arguments.index("--name") + 1])
        own = {**os.environ, "MIM_STACK__DATA_FOLDER": str(self.folder), **environment}
        return self._fork_server.run(arguments, own, timeout=180)

    def up(self, name: str) -> Any:
        return json.loads(self("stack", "up", "--name", name, "--json"))

    def state(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / name / "state.json").read_text())
        return values


@pytest.fixture
def mimstream(tmp_path: Path, fork_server: ForkServer) -> Iterator[Mimstream]:
    command = Mimstream(tmp_path / "stacks", fork_server)
    yield command
    for name in command.names:
        command.result("stack", "down", "--name", name, "--purge")


@pytest.fixture
def leave_traces() -> Iterator[LeaveTraces]:
    with ExitStack() as opened:

        def leave(endpoints: dict[str, dict[str, str]], name: str) -> Traces:
            left = Traces(endpoints, name)
            opened.enter_context(left.redis)
            left.leave()
            return left

        yield leave


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_is_back_with_its_data(stack: RunningStack, part: PartName, leave_traces: LeaveTraces) -> None:
    left = leave_traces(stack.endpoints, f"kill_{part}")
    before, restarts = stack.pid(part), stack.restarts(part)
    stack.kill(part)
    stack.wait_ready(part)
    assert stack.pid(part) != before
    assert stack.restarts(part) == restarts + 1
    left.check()


def test_a_part_that_was_stopped_stays_down_until_it_is_started(stack: RunningStack) -> None:
    stack.stop("valkey")
    try:
        time.sleep(0.5)
        with pytest.raises(Unavailable, match="not running"):
            stack.pid("valkey")
        with pytest.raises(Unavailable):
            stack.wait_ready("valkey", timeout_seconds=0.2)
    finally:
        stack.start("valkey")
        stack.wait_ready("valkey")


def test_a_folder_has_one_owner(stack: RunningStack) -> None:
    with (
        pytest.raises(Misconfigured, match=r"runs already .process \d+"),
        running_stack(stack.folder.path, load_settings().stack),
    ):
        pass
    stack.wait_ready("kafka")


def test_half_written_indexes_do_not_keep_milvus_from_its_rows(stack: RunningStack, leave_traces: LeaveTraces) -> None:
    left = leave_traces(stack.endpoints, "half_index")
    client = MilvusClient(uri=stack.endpoints["milvus"]["uri"], timeout=30)
    client.load_collection("half_index")
    client.close()
    data = stack.folder.data("milvus") / "data"
    # what is being written anew is not there for a moment
    indexes = wait_until(lambda: list(data.rglob("half_index/**/indexes/*.idx")), "an index in the folder", 30)
    stack.kill("milvus")  # and the kill came in the middle of writing an index
    for index in indexes:
        if index.exists():
            index.write_bytes(b"half")
    stack.wait_ready("milvus")
    if any(index.exists() and index.read_bytes() == b"half" for index in indexes):
        stack.kill("milvus")  # the keeper was faster than this test; now the half file is there from the start
        stack.wait_ready("milvus")
    left.check()


def test_stacks_run_side_by_side_and_come_back_after_any_kill(mimstream: Mimstream, leave_traces: LeaveTraces) -> None:
    one, two = mimstream.up("one"), mimstream.up("two")
    own = {"127.0.0.1", str(mimstream.folder)}  # addresses and folders: nothing of one stack is another's
    places = [value for up in (one, two) for value in up["environment"].values() if any(word in value for word in own)]
    assert len(places) == len(set(places)) == 10
    assert mimstream.up("one") == one  # asking again changes nothing

    left = leave_traces(one["endpoints"], "left")
    status = ("stack", "status", "--name", "one", "--json")
    report = json.loads(mimstream(*status))
    assert report["ready"]
    assert {part["part"] for part in report["parts"] if part["answers"]} == set(PARTS)

    # a part is killed: its supervisor brings it back
    broker = mimstream.state("one")["parts"]["kafka"]["process"]["pid"]
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: json.loads(mimstream.result(*status).stdout)["ready"], "the stack to be ready", 60)
    assert mimstream.state("one")["parts"]["kafka"]["restarts"] == 1
    left.check()

    # the supervisor is killed: its parts die with it, and `up` starts again with the data
    state = mimstream.state("one")
    os.kill(state["owner"]["pid"], signal.SIGKILL)
    parts = [part["process"]["pid"] for part in state["parts"].values()]
    wait_until(lambda: not any(ProcessId.of(pid) for pid in parts), "the parts to die with their parent", 30)
    assert "does not run" in mimstream("stack", "status", "--name", "one", ok=False)
    assert "stack up --name one" in mimstream("--stack", "one", "topics", "list", ok=False)
    assert mimstream.up("one") == one  # clients find it where it was
    left.check()
    assert "exists" in mimstream("--stack", "one", "topics", "list", "--json")

    # down leaves the data, --purge does not, and neither touches the other stack
    parts = [part["process"]["pid"] for part in mimstream.state("one")["parts"].values()]
    assert "stopped" in mimstream("stack", "down", "--name", "one")
    assert not any(ProcessId.of(pid) for pid in parts)
    assert "was not running" in mimstream("stack", "down", "--name", "one")
    mimstream("stack", "up", "--name", "one")
    left.check()
    mimstream("stack", "down", "--name", "one", "--purge")
    assert not (mimstream.folder / "one").exists()
    assert json.loads(mimstream("stack", "status", "--name", "two", "--json"))["ready"]


def test_no_jars_and_no_network_names_the_two_ways_out(mimstream: Mimstream, tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
    empty = str(tmp_path / "empty")
    said = mimstream("stack", "up", "--name", "offline", ok=False, MIM_STACK__CACHE_FOLDER=empty, **nowhere)
    assert "MIM_STACK__KAFKA_JARS" in said
    assert "MIM_KAFKA__BOOTSTRAP_SERVERS" in said
    assert "Traceback" not in said
    assert not (mimstream.folder / "offline").exists()


def test_a_folder_of_jars_replaces_the_network(tmp_path: Path) -> None:
    config = load_settings().stack
    jars = next(config.cache_folder.glob("kafka-jars-*/"))
    own = StackConfig(cache_folder=tmp_path / "empty", kafka_jars=jars)
    with running_stack(tmp_path / "own", own) as running:
        assert running.pid("kafka")
    assert not (tmp_path / "empty").exists()


def test_a_part_that_does_not_start_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    (folder / "valkey" / "appendonlydir").mkdir(parents=True)
    (folder / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    with (
        pytest.raises(Unavailable, match=r"valkey of stack 'broken'[\s\S]*valkey\.log[\s\S]*manifest") as caught,
        running_stack(folder, load_settings().stack),
    ):
        pass
    assert str(folder / "logs" / "valkey.log") in str(caught.value)
    state = json.loads((folder / "state.json").read_text())
    assert state["phase"] == "failed"
