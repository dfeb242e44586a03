"""An object store without a server: what remains of a lost race, and what an answer means."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import fsspec
import pytest
from botocore import exceptions as boto

from schemas.errors import Misconfigured, StoreUnavailable
from streams.stores.artifacts.artifact_store import NotFound, VersionedPointer
from streams.stores.artifacts.object_store import S3ArtifactStore, _OnS3, _open

NAMED = "s3://models/x (MIM_MODELS__URL)"


class Place:
    """One place in fsspec's memory."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.memory = fsspec.filesystem("memory")

    def open(self) -> S3ArtifactStore:
        return S3ArtifactStore(f"memory://{self.name}", entries="things", pointer="current.json", named=NAMED)

    def files(self) -> list[str]:
        return sorted(path.removeprefix(f"/{self.name}/") for path in self.memory.find(f"/{self.name}"))

    def write(self, path: str, content: bytes = b"x", *, hours_ago: float = 0) -> None:
        self.memory.pipe_file(f"/{self.name}/{path}", content)
        self.memory.store[f"/{self.name}/{path}"].created = datetime.now(UTC) - timedelta(hours=hours_ago)


@pytest.fixture
def place() -> Place:
    return Place()


class Conditional:
    """The conditional requests of a store, of which `before_put` gets the path of each put."""

    def __init__(self, plain: Any, before_put: Any) -> None:
        self.read, self._put, self._before = plain.read, plain.put, before_put

    def put(self, path: str, content: bytes, *, expected: VersionedPointer | None) -> bool:
        self._before(path)
        done: bool = self._put(path, content, expected=expected)
        return done


def test_an_entry_ends_with_its_index_so_that_nobody_sees_a_part_of_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.open()
    store.put("r1", {"a": b"1"})
    store.attach("r1", "b", b"2")
    remove, seen = store._remove, []

    def removed(path: str) -> None:
        remove(path)
        seen.append(store.names())

    monkeypatch.setattr(store, "_remove", removed)
    store.delete("r1")
    assert seen == [[], [], []] and place.files() == []


def test_of_an_entry_that_another_writer_made_meanwhile_nothing_of_ours_is_left(place: Place) -> None:
    store, other = place.open(), place.open()

    def overtaken(path: str) -> None:
        if path.endswith("r1.json"):
            other.put("r1", {"a": b"theirs"})

    conditional: Any = Conditional(store._conditional, overtaken)
    store._conditional = conditional
    store.put("r1", {"a": b"ours", "b": b"ours"})
    assert store.read("r1", "a") == b"theirs" and len(place.files()) == 2
    with pytest.raises(NotFound):
        store.read("r1", "b")


def test_a_file_that_differs_from_its_checksum_is_not_read(place: Place) -> None:
    store = place.open()
    store.put("r1", {"a": b"1", "b": b"2"})
    (path,) = [path for path in place.files() if path.endswith("/b")]
    place.write(path, b"3")
    assert store.read("r1", "a") == b"1"
    with pytest.raises(StoreUnavailable, match=r"r1/b in .* differs from its checksum"):
        store.read("r1", "b")
    place.memory.rm(f"/{place.name}/{path}")
    with pytest.raises(NotFound):
        store.read("r1", "b")


def test_a_deleted_entry_leaves_no_object(place: Place) -> None:
    store = place.open()
    store.put("r1", {"a": b"1"})
    store.attach("r1", "verdict.json", b"{}")
    store.put("r2", {"a": b"2"})
    left = [path for path in place.files() if path.startswith("things/r2")]
    store.delete("r1")
    assert place.files() == left and len(left) == 2


def test_a_sweep_takes_old_attempts_and_spares_one_that_is_still_written(place: Place) -> None:
    store = place.open()
    store.put("r1", {"a": b"1"})
    store.attach("r1", "verdict.json", b"{}")
    counted = place.files()
    for path in counted:
        place.write(path, place.memory.cat_file(f"/{place.name}/{path}"), hours_ago=9)
    place.write("things/r2.aaaaaaaaaaaa/a", hours_ago=9)
    place.write("things/r3.attached/verdict.json", hours_ago=9)
    place.write("things/r4.bbbbbbbbbbbb/a", hours_ago=9)
    place.write("things/r4.bbbbbbbbbbbb/b", hours_ago=0)
    store.sweep(3_600)
    assert place.files() == sorted([*counted, "things/r4.bbbbbbbbbbbb/a", "things/r4.bbbbbbbbbbbb/b"])
    assert store.read("r1", "verdict.json") == b"{}" and store.names() == ["r1"]


def answered(status: int) -> OSError:
    """What s3fs raises for an answer of this status."""
    error = OSError(5, f"status {status}")
    error.__cause__ = boto.ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    return error


@pytest.mark.parametrize(
    ("error", "expected", "told"),
    [
        (FileNotFoundError("models"), Misconfigured, "no such bucket"),
        (NotImplementedError("conditions"), Misconfigured, "no conditional puts"),
        (PermissionError("Access Denied"), Misconfigured, "does not let us read"),
        (answered(501), Misconfigured, "no conditional puts"),
        (answered(500), StoreUnavailable, "cannot read"),
        (OSError("reset"), StoreUnavailable, "cannot read"),
        (boto.NoCredentialsError(), Misconfigured, "credentials"),
        (boto.EndpointConnectionError(endpoint_url="http://x"), StoreUnavailable, "cannot read"),
        (boto.ReadTimeoutError(endpoint_url="http://x"), StoreUnavailable, r"waited 7 s \(MIM_MODELS__TIMEOUT"),
        (TimeoutError("timeout"), StoreUnavailable, r"waited 7 s \(MIM_MODELS__TIMEOUT"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
def test_what_heals_by_waiting_is_told_apart_from_what_somebody_has_to_mend(
    place: Place, error: Exception, expected: type[Exception], told: str
) -> None:
    store = S3ArtifactStore(f"memory://{place.name}", entries="e", pointer="p", named=NAMED, timeout_seconds=7.0)

    def fail(path: str) -> Any:
        raise error

    store._conditional.read = fail  # type: ignore[method-assign]
    with pytest.raises(expected, match=told) as caught:
        store.pointer()
    assert NAMED in str(caught.value)
    assert ("waited" in str(caught.value)) is ("waited" in told)


def test_a_fault_of_ours_keeps_its_name(place: Place) -> None:
    store = place.open()

    def fail(path: str) -> Any:
        raise ZeroDivisionError

    store._conditional.read = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        store.pointer()


class Bucket:
    """s3fs, which answers each request with an error, or none."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.requests: list[dict[str, Any]] = []

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, method: str, **given: Any) -> None:
        self.requests.append({"method": method, **given})
        if self.error is not None:
            raise self.error

    def invalidate_cache(self) -> None: ...


HELD = VersionedPointer(b"1", '"tag"')


@pytest.mark.parametrize(("expected", "condition"), [(None, {"IfNoneMatch": "*"}), (HELD, {"IfMatch": '"tag"'})])
def test_a_put_carries_the_condition_that_it_is_to_be_refused_by(
    expected: VersionedPointer | None, condition: dict[str, str]
) -> None:
    bucket = Bucket()
    assert _OnS3(bucket).put("models/x/current.json", b"2", expected=expected)
    request = {"method": "put_object", "Bucket": "models", "Key": "x/current.json", "Body": b"2"}
    assert bucket.requests == [request | condition]


@pytest.mark.parametrize("status", [409, 412])
def test_a_put_whose_condition_is_not_met_has_written_nothing(status: int) -> None:
    for expected in (None, HELD):
        assert not _OnS3(Bucket(answered(status))).put("models/x", b"2", expected=expected)


def test_another_refusal_of_a_put_is_raised_and_an_object_that_is_gone_is_a_lost_race() -> None:
    for error in (answered(500), answered(403), OSError("reset")):
        with pytest.raises(OSError):
            _OnS3(Bucket(error)).put("models/x", b"2", expected=HELD)
    gone = FileNotFoundError("x")
    assert not _OnS3(Bucket(gone)).put("models/x", b"2", expected=HELD)
    with pytest.raises(FileNotFoundError):
        _OnS3(Bucket(gone)).put("models/x", b"2", expected=None)


def test_a_request_waits_half_the_time_twice_unless_the_options_say_otherwise() -> None:
    options: dict[str, Any] = {"skip_instance_cache": True, "config_kwargs": {"read_timeout": 99}}
    fs, root = _open("s3://models/x/", options, NAMED, 6.0)
    once = {"total_max_attempts": 1}
    assert fs.config_kwargs == {"connect_timeout": 3.0, "read_timeout": 99, "retries": once}
    assert (fs.retries, root) == (2, "models/x")
    assert options == {"skip_instance_cache": True, "config_kwargs": {"read_timeout": 99}}
