"""Kafka's jars: fetched once by a pinned list, and used only if every byte is as pinned."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from rich.console import Console

from schemas.errors import Misconfigured
from streams.runtime.progress import progress_bar
from streams.stack.config import StackConfig

log = structlog.get_logger()

LOCK_FILE = Path(__file__).with_name("kafka-jars.lock")
PARALLEL_DOWNLOADS = 4
DOWNLOAD_ATTEMPTS = 3
_FETCHING = "Fetching the jars of Apache Kafka (once)"


class JarsUnavailable(Exception):
    """A jar could not be fetched; the message says which and why."""


@dataclass(frozen=True)
class JarPin:
    """One jar: where it comes from and what its bytes must be."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file, as Maven names it."""
        return f"{self.artifact}-{self.version}.jar"


def read_lock(path: Path = LOCK_FILE) -> list[JarPin]:
    """The pinned jars. Lines are `group:artifact:version sha256:HEX`; `#` starts a comment line."""
    pins = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            coordinate, digest = line.split()
            group, artifact, version = coordinate.split(":")
            pins.append(JarPin(group, artifact, version, digest.removeprefix("sha256:")))
    return pins


def differences(folder: Path, pins: list[JarPin]) -> list[str]:
    """What is missing, other or too much in `folder` against the pins; empty if it is exactly as pinned."""
    wanted = {pin.file_name: pin.sha256 for pin in pins}
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found)]
    problems += [f"{name} is not pinned" for name in sorted(found - wanted.keys())]
    problems += [
        f"{name} is not what was pinned"
        for name in sorted(found & wanted.keys())
        if _sha256(folder / name) != wanted[name]
    ]
    return problems


def kafka_class_path(config: StackConfig, console: Console | None = None, pins: list[JarPin] | None = None) -> str:
    """The Java class path of Kafka, fetching the jars if they are not in the cache; `console` shows the progress.

    Raises `Misconfigured` if the jars cannot be had, naming the two ways out.
    """
    if config.kafka_jars is not None:
        return _class_path(_own_jars(config.kafka_jars))
    pins = pins or read_lock()
    # the name holds the pins' digest: another version of this package never finds the wrong jars
    digest = hashlib.sha256("".join(sorted(pin.sha256 for pin in pins)).encode()).hexdigest()[:16]
    folder = config.cache_folder / f"kafka-jars-{digest}"
    try:
        config.cache_folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(config.cache_folder / "kafka-jars.lock"):
            problems = differences(folder, pins)
            if problems:
                if folder.exists():
                    log.warning("stack.jars_refused", folder=str(folder), problems=problems[:3])
                _build(folder, pins, config, console)
    except (JarsUnavailable, OSError) as error:
        raise Misconfigured(
            f"the jars of Apache Kafka are not in {config.cache_folder} and could not be fetched: {error}\n"
            "Two ways out without a network:\n"
            "  - set MIM_STACK__KAFKA_JARS to a folder of Apache Kafka 4 jars (`libs` of its release archive)\n"
            "  - set MIM_KAFKA__BOOTSTRAP_SERVERS to the address of a running broker"
        ) from error
    return _class_path(sorted(folder.glob("*.jar")))


def _own_jars(folder: Path) -> list[Path]:
    jars = sorted(folder.expanduser().rglob("*.jar"))
    if not any(jar.name.startswith("kafka_2.") for jar in jars):
        raise Misconfigured(
            f"MIM_STACK__KAFKA_JARS={folder} holds {len(jars)} jars but no kafka_2.*.jar: "
            "name the `libs` folder of an Apache Kafka 4 release"
        )
    return jars


def _class_path(jars: list[Path]) -> str:
    return ":".join(str(jar) for jar in jars)


def _build(folder: Path, pins: list[JarPin], config: StackConfig, console: Console | None) -> None:
    """Fetch into a folder beside the right one, compare, rename: a half-built folder never has the right name."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(folder, ignore_errors=True)
    building.mkdir(exist_ok=True)
    download = building / "download"
    shutil.rmtree(download, ignore_errors=True)
    with _progress(console, download, len(pins)), ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        futures = [pool.submit(_fetch, pin, building, download, config.maven_repository) for pin in pins]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shutil.rmtree(download, ignore_errors=True)
    for stray in {path.name for path in building.iterdir()} - {pin.file_name for pin in pins}:
        (building / stray).unlink()
    problems = differences(building, pins)
    if problems:
        raise JarsUnavailable("; ".join(problems[:3]))
    os.replace(building, folder)
    log.info("stack.jars_fetched", folder=str(folder), jars=len(pins))


def _fetch(pin: JarPin, building: Path, download: Path, repository: str | None) -> None:
    # imported here: jgo and requests are needed once per machine
    import requests
    from jgo.maven import MavenContext

    target = building / pin.file_name
    if target.exists() and _sha256(target) == pin.sha256:
        return  # left by an interrupted build
    context = MavenContext(
        repo_cache=download, remote_repos={"other": repository.rstrip("/")} if repository else None, timeout=20
    )
    problem = ""
    for _ in range(DOWNLOAD_ATTEMPTS):
        artifact = context.project(pin.group, pin.artifact).at_version(pin.version).artifact()
        try:
            path = artifact.resolve()
        except (requests.RequestException, RuntimeError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
            partial = artifact.cached_path
            if partial is not None:
                partial.unlink(missing_ok=True)  # jgo would take half a file for the whole one
            continue
        if _sha256(path) == pin.sha256:
            os.replace(path, target)
            return
        problem = "what came is not what was pinned"
        path.unlink()
    raise JarsUnavailable(f"{pin.file_name}: {problem}")


@contextmanager
def _progress(console: Console | None, download: Path, jars: int) -> Iterator[None]:
    """A bar that follows the files on disk, because jgo's callback gets no size where the server sends none."""
    if console is None:
        yield
        return
    building = download.parent
    done = threading.Event()
    with progress_bar(_FETCHING, jars, console, keep=True) as bar:

        def look() -> None:
            megabytes = sum(_size(path) for path in building.rglob("*.jar")) / 1e6
            bar.set(len(list(building.glob("*.jar"))), what=f"{_FETCHING}, {megabytes:.1f} MB")

        def follow() -> None:
            while not done.wait(0.2):
                look()

        follower = threading.Thread(target=follow, name="jar-progress", daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()
            look()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # moved into its place meanwhile


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process at a time builds or checks the jars; the others wait."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
