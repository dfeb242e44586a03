"""Object stores that are not what a writer relies on: told before anything is lost, and within a command's patience."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import Misconfigured, StoreUnavailable
from streams.stores.artifacts.artifact_store import FolderArtifactStore, InMemoryArtifactStore
from streams.stores.artifacts.object_store import S3ArtifactStore
from tests.factories.s3_server import Answer, s3_server

NAMES = {"entries": "things", "pointer": "current.json", "named": "s3://models/x (MIM_MODELS__URL)"}
BUCKET = "faulty-models"


def open_store(address: str, bucket: str = BUCKET, **more: Any) -> S3ArtifactStore:
    access = {"key": "any", "secret": "any", "endpoint_url": address}
    options = access | {"client_kwargs": {"region_name": "us-east-1"}, "skip_instance_cache": True}
    return S3ArtifactStore(f"s3://{bucket}/x", options=options, **NAMES, **more)


def without(*headers: str) -> Callable[[Answer], Answer]:
    def change(app: Answer) -> Answer:
        return lambda request, begin: app({k: v for k, v in request.items() if k not in headers}, begin)

    return change


def test_a_store_that_heeds_conditions_passes_and_keeps_nothing_of_the_probe() -> None:
    with s3_server(BUCKET) as address:
        store = open_store(address)
        store.check()
        assert store._fs.find(BUCKET) == []


@pytest.mark.parametrize("ignored", ["HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"])
def test_a_store_that_ignores_a_condition_is_refused(ignored: str) -> None:
    with (
        s3_server(BUCKET, without(ignored)) as address,
        pytest.raises(Misconfigured, match=r"If-Match, If-None-Match.*MIM_MODELS"),
    ):
        open_store(address).check()


def test_a_store_without_conditional_puts_is_refused() -> None:
    def change(app: Answer) -> Answer:
        def answer(request: dict[str, Any], begin: Any) -> Any:
            if "HTTP_IF_MATCH" in request or "HTTP_IF_NONE_MATCH" in request:
                request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
                body = b"<Error><Code>NotImplemented</Code><Message>not implemented</Message></Error>"
                begin("501 Not Implemented", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
                return [body]
            return app(request, begin)

        return answer

    with s3_server(BUCKET, change) as address, pytest.raises(Misconfigured, match="no conditional puts"):
        open_store(address).check()


def test_a_missing_bucket_is_named_as_such() -> None:
    with s3_server(BUCKET) as address, pytest.raises(Misconfigured, match="no such bucket"):
        open_store(address, "elsewhere").check()


def test_a_store_that_hangs_is_given_up_within_the_time_that_a_setting_names() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        store = open_store(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_seconds=1.0)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"waited 1 s \(MIM_MODELS__TIMEOUT_SECONDS\)"):
            store.pointer()
        assert time.monotonic() - started < 10


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot write in here"):
        FolderArtifactStore(tmp_path / "file", entries="things", pointer="current.json", named="here").check()
    sound = FolderArtifactStore(tmp_path / "new", entries="things", pointer="current.json", named="here")
    sound.put("one", {"file": b"1"})
    sound.check()
    assert sound.names() == ["one"] and not list((tmp_path / "new").rglob("*check*"))
    InMemoryArtifactStore().check()


def test_a_folder_of_releases_that_is_no_folder_is_refused_though_the_root_is_one(tmp_path: Path) -> None:
    (tmp_path / "things").touch()
    with pytest.raises(StoreUnavailable, match="cannot write in here"):
        FolderArtifactStore(tmp_path, entries="things", pointer="current.json", named="here").check()
