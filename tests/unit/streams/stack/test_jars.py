"""Kafka's jars are used only when every byte is as pinned."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from schemas.errors import Misconfigured
from streams.stack.config import StackConfig
from streams.stack.jars import JarPin, differences, kafka_class_path, read_lock

CONTENTS = {"alpha": b"the first jar", "beta": b"the second jar" * 1000}


class MavenRepository:
    """A Maven repository over HTTP on this machine, with two small jars."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        for name, content in CONTENTS.items():
            self.path(name).parent.mkdir(parents=True)
            self.path(name).write_bytes(content)
        asked = self.asked

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                if self.path.endswith(".jar"):
                    asked.append(Path(self.path).name)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))

    def path(self, name: str) -> Path:
        return self.root / "org" / "example" / name / "1.0" / f"{name}-1.0.jar"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[MavenRepository]:
    made = MavenRepository(tmp_path / "repository")
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def config(repository: MavenRepository, tmp_path: Path) -> StackConfig:
    host, port = repository.server.server_address[:2]
    return StackConfig(cache_folder=tmp_path / "cache", maven_repository=f"http://{host!s}:{port}/")


@pytest.fixture
def pins() -> list[JarPin]:
    return [
        JarPin("org.example", name, "1.0", hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items()
    ]


def contents(class_path: str) -> list[bytes]:
    return [Path(jar).read_bytes() for jar in class_path.split(":")]


def test_the_shipped_list_pins_kafka_and_names_no_host() -> None:
    pins = read_lock()
    names = {pin.file_name for pin in pins}
    assert {"kafka_2.13-4.3.1.jar", "kafka-clients-4.3.1.jar", "slf4j-simple-1.7.36.jar"} <= names
    assert len(names) == len(pins) == 46
    assert all(len(pin.sha256) == 64 for pin in pins)
    assert not any("/" in f"{pin.group}{pin.artifact}{pin.version}" for pin in pins)


def test_jars_are_fetched_once(repository: MavenRepository, config: StackConfig, pins: list[JarPin]) -> None:
    first = kafka_class_path(config, pins=pins)
    assert contents(first) == list(CONTENTS.values())
    asked = list(repository.asked)
    assert sorted(asked) == ["alpha-1.0.jar", "beta-1.0.jar"]
    assert kafka_class_path(config, pins=pins) == first
    assert repository.asked == asked


def test_progress_counts_the_jars(config: StackConfig, pins: list[JarPin]) -> None:
    console = Console(record=True, force_terminal=True, width=100)
    kafka_class_path(config, console, pins=pins)
    shown = console.export_text()
    assert "jars of Apache Kafka" in shown and "2/2" in shown


@pytest.mark.parametrize("damage", ["tampered", "missing", "added"])
def test_a_damaged_folder_is_refused_and_built_again(config: StackConfig, pins: list[JarPin], damage: str) -> None:
    class_path = kafka_class_path(config, pins=pins)
    folder = Path(class_path.split(":")[0]).parent
    if damage == "tampered":
        (folder / "alpha-1.0.jar").write_bytes(b"THE first jar")
    elif damage == "missing":
        (folder / "beta-1.0.jar").unlink()
    else:
        (folder / "gamma-1.0.jar").write_bytes(b"shadows a class")
    assert len(differences(folder, pins)) == 1
    assert contents(kafka_class_path(config, pins=pins)) == list(CONTENTS.values())
    assert differences(folder, pins) == []


def test_an_interrupted_build_goes_on_where_it_stopped(
    repository: MavenRepository, config: StackConfig, pins: list[JarPin]
) -> None:
    folder = Path(kafka_class_path(config, pins=pins).split(":")[0]).parent
    building = folder.with_name(f"{folder.name}.building")
    folder.rename(building)
    (building / "beta-1.0.jar").write_bytes(b"half")
    (building / "stray.tmp").write_bytes(b"")
    repository.asked.clear()
    assert contents(kafka_class_path(config, pins=pins)) == list(CONTENTS.values())
    assert repository.asked == ["beta-1.0.jar"]
    assert not building.exists()


def test_what_is_not_as_pinned_never_gets_the_right_name(config: StackConfig, pins: list[JarPin]) -> None:
    wrong = [pins[0], replace(pins[1], sha256="0" * 64)]
    with pytest.raises(Misconfigured, match=r"beta-1.0.jar: what came is not what was pinned"):
        kafka_class_path(config, pins=wrong)
    assert not [folder for folder in config.cache_folder.glob("kafka-jars-*/") if folder.suffix != ".building"]


def test_a_missing_jar_names_the_ways_out(repository: MavenRepository, config: StackConfig, pins: list[JarPin]) -> None:
    repository.path("beta").unlink()
    with pytest.raises(Misconfigured, match=r"beta-1.0.jar[\s\S]*MIM_STACK__KAFKA_JARS[\s\S]*MIM_KAFKA__BOOTSTRAP"):
        kafka_class_path(config, pins=pins)


def test_an_own_folder_must_hold_kafka(tmp_path: Path) -> None:
    jars = tmp_path / "libs"
    jars.mkdir()
    (jars / "other.jar").touch()
    config = StackConfig(kafka_jars=jars, cache_folder=tmp_path / "cache")
    with pytest.raises(Misconfigured, match=r"holds 1 jars but no kafka_2"):
        kafka_class_path(config)
    (jars / "kafka_2.13-4.2.0.jar").touch()
    assert kafka_class_path(config) == f"{jars}/kafka_2.13-4.2.0.jar:{jars}/other.jar"
    assert not config.cache_folder.exists()
