"""A server on the loopback device that speaks S3 and checks no credentials."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[Any]:
    """Client of a server with a bucket, which everything that speaks S3 in this process then uses."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in s3_environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=bucket)
    yield client
    client.close()
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def s3_environment(url: str) -> dict[str, str]:
    """Variables with which clients take this server, and no credentials of the machine."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
