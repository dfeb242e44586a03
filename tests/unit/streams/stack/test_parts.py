"""What each part of the stack is started with, prepared for, and asked; and what a supervisor says and ends with."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from schemas.errors import Misconfigured, PipelineError, Unavailable
from streams.commands import stack as command
from streams.settings import Settings
from streams.stack import kafka_part, supervisor
from streams.stack.config import NOWHERE_ELSE, StackConfig
from streams.stack.folder import PartState, Ports, ProcessId, StackFolder, StackState, tail
from streams.stack.kafka_part import KafkaPart
from streams.stack.milvus_part import MilvusPart
from streams.stack.parts import NotReady
from streams.stack.run import all_stacks, endpoints_of, folders_of, make_parts, phase_of
from streams.stack.supervisor import PartReport
from streams.stack.valkey_part import ValkeyPart

PORTS = Ports(kafka=1, kafka_controller=2, valkey=3, milvus=4)


def live() -> ProcessId:
    found = ProcessId.of(os.getpid())
    assert found is not None
    return found


DEAD = ProcessId(os.getpid(), 1)


# ---- Milvus ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [0, 1, -9, None])
def test_saved_indexes_are_kept_after_a_clean_stop_alone_and_rows_always(tmp_path: Path, ended: int | None) -> None:
    part = MilvusPart(tmp_path / "milvus", 4)
    part.prepare(tmp_path / "log")
    indexes = tmp_path / "milvus" / "data" / "one" / "indexes"
    indexes.mkdir(parents=True)
    for name in ("a.idx", "a.sidx", "a.rows"):
        (indexes / name).touch()
    if ended is not None:
        part.stopped(ended)
    part.prepare(tmp_path / "log")
    assert {path.name for path in indexes.iterdir()} == ({"a.rows", "a.idx", "a.sidx"} if ended == 0 else {"a.rows"})
    part.prepare(tmp_path / "log")  # the mark of a clean stop counts for one start
    assert {path.name for path in indexes.iterdir()} == {"a.rows"}


def test_the_store_of_vectors_listens_here_alone_and_writes_one_at_a_time(tmp_path: Path) -> None:
    words = MilvusPart(tmp_path, 4).command()
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options == {"--data-dir": str(tmp_path / "data"), "--host": "127.0.0.1", "--port": "4", "--max-workers": "1"}


# ---- Valkey ----------------------------------------------------------------------------------------------------------


def test_valkey_listens_here_alone_and_keeps_every_write(tmp_path: Path) -> None:
    words = ValkeyPart(tmp_path, 3).command()
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--bind"] == "127.0.0.1" and options["--port"] == "3" and options["--dir"] == str(tmp_path)
    assert (options["--appendonly"], options["--save"], options["--daemonize"]) == ("yes", "", "no")


@pytest.mark.parametrize(
    ("state", "ready"),
    [
        ({"aof_enabled": 1, "aof_last_write_status": "ok"}, True),
        ({"aof_enabled": 0, "aof_last_write_status": "ok"}, False),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, False),
        (None, False),
    ],
)
def test_valkey_is_ready_once_it_answers_and_writes_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: dict[str, Any] | None, ready: bool
) -> None:
    closed: list[bool] = []

    def ping() -> None:
        if state is None:
            raise redis.exceptions.BusyLoadingError("loading")

    client = SimpleNamespace(ping=ping, info=lambda section: state, close=lambda: closed.append(True))
    monkeypatch.setattr("streams.stack.valkey_part.redis.Redis", lambda **_: client)
    if ready:
        ValkeyPart(tmp_path, 3).probe(1.0)
    else:
        with pytest.raises(NotReady, match=r"127\.0\.0\.1:3"):
            ValkeyPart(tmp_path, 3).probe(1.0)
    assert closed == [True]


# ---- Kafka -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1])
def test_a_log_folder_is_formatted_once_and_what_a_killed_formatting_left_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(
        "streams.stack.kafka_part.subprocess.run",
        lambda words, **_: calls.append(words) or SimpleNamespace(returncode=status),
    )
    part = KafkaPart(tmp_path / "kafka", 1, 2, "jars", 256)
    left = tmp_path / "kafka" / "logs" / "half"
    left.mkdir(parents=True)
    if status:
        with pytest.raises(NotReady, match="status 1"):
            part.prepare(tmp_path / "log")
    else:
        part.prepare(tmp_path / "log")
        left.mkdir(parents=True)
    assert left.exists() == (status == 0) and calls[0][-5:-3] == ["format", "-t"]
    if status == 0:
        part.prepare(tmp_path / "log")
        assert len(calls) == 1 and left.exists(), "data of a broker that ran"
    held = dict(line.split("=", 1) for line in (tmp_path / "kafka" / "server.properties").read_text().splitlines())
    assert held == part.properties() and held["log.dirs"] == str(tmp_path / "kafka" / "logs")
    assert held["auto.create.topics.enable"] == "false" and "127.0.0.1:1" in held["advertised.listeners"]
    assert all(":1" in one or ":2" in one for one in held["listeners"].split(","))
    assert held["controller.quorum.voters"] == "1@127.0.0.1:2" and "0.0.0.0" not in str(held)
    assert "-Xmx256m" in part.command() and part.command()[-1].endswith("server.properties")


def test_ids_of_clusters_are_16_bytes_and_begin_with_no_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([b"\xf8" + bytes(15), b"\x01" * 16])
    monkeypatch.setattr("streams.stack.kafka_part.os.urandom", lambda size: next(drawn)[:size])
    assert kafka_part._random_cluster_id() == "AQEBAQEBAQEBAQEBAQEBAQ"


def test_a_missing_java_is_told_with_the_way_around_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kafka_part, "JAVA", tmp_path / "java")
    with pytest.raises(Misconfigured, match="MIM_KAFKA__BOOTSTRAP_SERVERS"):
        kafka_part.require_java()
    (tmp_path / "java").touch()
    kafka_part.require_java()


# ---- a stack ---------------------------------------------------------------------------------------------------------


def test_parts_and_clients_use_the_same_ports(tmp_path: Path) -> None:
    parts = {
        part.name: part for part in make_parts(StackFolder(tmp_path), PORTS, "jars", StackConfig(kafka_heap_mb=300))
    }
    assert {name: part.port for name, part in parts.items()} == {"kafka": 1, "valkey": 3, "milvus": 4}
    kafka: Any = parts["kafka"]
    assert (kafka.controller_port, kafka.class_path, kafka.heap_mb, kafka.folder) == (
        2,
        "jars",
        300,
        tmp_path / "kafka",
    )
    found = endpoints_of(PORTS)
    assert found["kafka"]["bootstrap_servers"] == "127.0.0.1:1" and found["redis"]["url"] == "redis://127.0.0.1:3/0"
    assert found["milvus"]["uri"] == "http://127.0.0.1:4"
    for part in ("topics", "kafka", "redis", "milvus"):
        assert found[part].items() >= NOWHERE_ELSE[part].items(), "logins of another system stay out"
    folders = folders_of(tmp_path)
    assert folders["models"] == {"url": None, "storage_options": {}, "folder": tmp_path / "models"}
    assert folders["train"] == {"snapshot_folder": None, "state_folder": tmp_path / "train"}


def test_stacks_are_listed_by_name_with_what_they_do(tmp_path: Path) -> None:
    config = StackConfig(data_folder=tmp_path / "stacks")
    assert all_stacks(config) == []
    for name in ("b", "a"):
        (tmp_path / "stacks" / name).mkdir(parents=True)
    (tmp_path / "stacks" / "file").touch()
    first, second = all_stacks(config)
    assert (first.name, second.name) == ("a", "b") and phase_of(first) == "not running"
    first.write_state(StackState("starting", live()))
    second.write_state(StackState("ready", DEAD))
    assert (phase_of(first), phase_of(second)) == ("starting", "not running")


@pytest.mark.parametrize(
    ("phase", "owner", "part", "answers", "told"),
    [
        ("ready", "live", "live", True, ""),
        ("ready", "live", "dead", True, "its process does not run"),
        ("ready", "dead", "live", True, "the stack does not run"),
        ("ready", "live", "live", False, "nothing answers"),
    ],
)
def test_a_part_answers_if_its_stack_runs_its_process_runs_and_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: Any, owner: str, part: str, answers: bool, told: str
) -> None:
    class Small(ValkeyPart):
        def probe(self, timeout_seconds: float) -> None:
            if not answers:
                raise NotReady("nothing answers")

    folder = StackFolder(tmp_path / "s")
    assert supervisor.status(folder, StackConfig()) == []
    folder.claim()
    folder.ports(fixed=None)
    ids = {"live": live(), "dead": DEAD}
    folder.write_state(StackState(phase, ids[owner], {"valkey": PartState(ids[part], restarts=3)}))
    monkeypatch.setattr(supervisor, "make_parts", lambda *_, **__: [Small(tmp_path, 7)])
    (report,) = supervisor.status(folder, StackConfig(), clock=iter([1.0, 1.5]).__next__)
    folder.release()
    assert (report.answers, report.detail, report.address, report.restarts) == (not told, told, "127.0.0.1:7", 3)
    assert report.pid == (os.getpid() if part == "live" else None)
    assert report.milliseconds == (None if told else 500.0) and report.log.endswith("valkey.log")


def test_a_supervisor_is_ready_if_it_says_so_itself_and_lives() -> None:
    ours = live()
    assert supervisor._is_ready(StackState("ready", ours), ours.pid)
    for state, pid in (
        (None, ours.pid), (StackState("starting", ours), ours.pid), (StackState("ready", ours), ours.pid + 1),
        (StackState("ready", DEAD), DEAD.pid),
    ):  # fmt: skip
        assert not supervisor._is_ready(state, pid)


@pytest.mark.parametrize(
    ("said", "status", "kind", "told"),
    [
        ("a line\nmimstream: port 1 is taken\n", 2, Misconfigured, "port 1 is taken"),
        ("a line\nmimstream: Kafka did not start\n", 3, Unavailable, "Kafka did not start"),
        ("Traceback: boom\n", 1, Unavailable, "boom"),
    ],
)
def test_what_a_supervisor_said_last_is_why_it_ended(
    tmp_path: Path, said: str, status: int, kind: type[PipelineError], told: str
) -> None:
    folder = StackFolder(tmp_path)
    file = folder.log_file("supervisor")
    file.write_text("mimstream: of an earlier start\n" + said)
    error = supervisor._why(status, folder, len("mimstream: of an earlier start\n"))
    assert type(error) is kind and told in str(error) and "earlier" not in str(error) and "a line" not in str(error)
    assert (str(file) in str(error)) == (status == 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (Misconfigured("wrong"), 2), (Unavailable("Kafka", "away"), 3), (PermissionError(13, "no", "/x"), 2)],
)
def test_a_supervisor_ends_with_what_kept_it_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception | None, status: int
) -> None:
    def supervise(name: str, config: StackConfig) -> None:
        assert (name, config.kafka_heap_mb) == ("mine", 300)
        if error is not None:
            raise error

    monkeypatch.setattr(supervisor, "supervise", supervise)
    monkeypatch.setattr(supervisor, "configure_logging", lambda: None)
    monkeypatch.setattr(
        "streams.stack.supervisor.sys.argv", ["x", "mine", StackConfig(kafka_heap_mb=300).model_dump_json()]
    )
    assert supervisor.main() == status
    assert capsys.readouterr().err.startswith(supervisor.ERROR_MARK if status else "")


def test_paths_of_a_configuration_hold_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = StackConfig(data_folder=Path("d"), cache_folder=Path("~/c"), kafka_jars=Path("j"))
    found = supervisor._absolute(given)
    assert (found.data_folder, found.cache_folder, found.kafka_jars) == (tmp_path / "d", tmp_path / "c", tmp_path / "j")
    assert supervisor._absolute(StackConfig()).kafka_jars is None


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_log_that_was_replaced_by_a_shorter_one_is_read_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("short\n")
    assert tail(file, since_byte=6) == "" and tail(file, since_byte=7) == "short" and tail(file, since_byte=2) == "ort"
    file.write_text("x" * 9_000 + "\nend\n")
    assert tail(file).endswith("x\nend") and len(tail(file)) < 8_200


def test_an_overlong_log_is_put_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("streams.stack.folder.LOG_LIMIT_BYTES", 5)
    folder = StackFolder(tmp_path)
    folder.log_file("kafka").write_text("12345")
    assert folder.log_file("kafka").read_text() == "12345"
    folder.log_file("kafka").write_text("123456")
    assert not folder.log_file("kafka").exists() and (tmp_path / "logs" / "kafka.log.1").read_text() == "123456"


# ---- the command -----------------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], folder: Path, *given: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stack", dest="stack_name")
    command.add_arguments(parser)
    settings = Settings()
    settings = settings.model_copy(update={"stack": settings.stack.model_copy(update={"data_folder": folder})})
    code = command.run(parser.parse_args(given), settings)
    return code, capsys.readouterr().out


@pytest.mark.parametrize(("answers", "code"), [([True, True], 0), ([True, False], 1), ([], 1)])
def test_a_stack_of_which_a_part_does_not_answer_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, answers: list[bool], code: int
) -> None:
    reports = [
        PartReport(f"p{n}", one, "1.2.3.4:5", 6, 7, 8.5 if one else None, "" if one else "dead", "/log")
        for n, one in enumerate(answers)
    ]
    monkeypatch.setattr(command, "status", lambda folder, _: reports if folder.name == "mine" else None)
    status, told = call(capsys, tmp_path, "status", "--name", "mine", "--json")
    assert (status, json.loads(told)["ready"], len(json.loads(told)["parts"])) == (code, code == 0, len(answers))
    status, told = call(capsys, tmp_path, "--stack", "mine", "status")
    assert status == code and ("p1: dead; log: /log" in told) == (answers == [True, False])
    assert ("was never started" in told) == (not answers)


def test_a_stack_is_stopped_and_its_data_stays_unless_it_is_purged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(command, "down", lambda folder, *, purge: asked.append((folder.name, purge)) or not purge)
    assert call(capsys, tmp_path, "down") == (0, f"stack 'default' stopped; its data stays in {tmp_path / 'default'}\n")
    told = call(capsys, tmp_path, "down", "--purge", "--name", "b")[1]
    assert told == "stack 'b' was not running; its data is deleted\n"
    told = call(capsys, tmp_path, "down", "--json")[1]
    assert json.loads(told) == {"name": "default", "was_running": True, "purged": False}
    assert asked == [("default", False), ("b", True), ("default", False)]
    with pytest.raises(Misconfigured, match="--purge"):
        call(capsys, tmp_path, "status", "--purge")


def test_stacks_that_were_started_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no stack was started" in call(capsys, tmp_path, "list")[1]
    (tmp_path / "never started").mkdir()
    folder = StackFolder(tmp_path / "mine")
    folder.path.mkdir()
    ports = folder.ports(fixed=None)
    rows = json.loads(call(capsys, tmp_path, "list", "--json")[1])
    assert rows == [
        {"name": "mine", "state": "not running", "address": f"127.0.0.1:{ports.kafka}", "folder": str(folder.path)}
    ]
    assert "mine" in call(capsys, tmp_path, "list")[1]


def test_what_must_not_be_set_is_unset_for_a_shell() -> None:
    lines = command.exports({"kafka": {"bootstrap_servers": "a b"}, "redis": {"password": None}}).splitlines()
    assert lines == ["  export MIM_KAFKA__BOOTSTRAP_SERVERS='a b'", "  unset MIM_REDIS__PASSWORD"]
