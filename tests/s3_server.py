"""Serve S3 on loopback, for tests of sources and of runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs
import pytest
from werkzeug.serving import WSGIRequestHandler


@contextmanager
def s3_server() -> Iterator[str]:
    """Start an S3 server; yield the URI of a folder in a bucket on it, with {} before the query."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    settings = {
        "AWS_ACCESS_KEY_ID": "of-moto",
        "AWS_SECRET_ACCESS_KEY": "of-moto",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        query = f"endpoint_override=http://{host}:{port}&scheme=http"
        filesystem, _ = pafs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        yield f"s3://bucket/prefix{{}}?{query}"
        server.stop()


@contextmanager
def recorded_requests() -> Iterator[list[str]]:
    """Yield a list that gets method and path of each request which a server of this process answers."""
    requests: list[str] = []

    def note(handler: WSGIRequestHandler, *_answer: object) -> None:
        requests.append(f"{handler.command} {handler.path}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSGIRequestHandler, "log_request", note)
        yield requests
