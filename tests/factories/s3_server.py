"""A local S3 with one bucket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[[dict[str, Any], Any], Any]
"""A WSGI application."""


@contextmanager
def s3_server(bucket: str, change: Callable[[Answer], Answer] = lambda app: app) -> Iterator[str]:
    """Its address; `change` stands before it. Requests are answered one by one: comparing and writing has no lock."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = change(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    access = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **access)
    client.create_bucket(Bucket=bucket)
    client.close()
    yield address
    server.shutdown()
    thread.join()
    server.server_close()
