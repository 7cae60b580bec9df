"""A real S3 server on loopback (moto's), for tests of remote inputs, outputs and pools."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from megatron_groupmates.utils.storage import configure_storage

BUCKET = "data"


@pytest.fixture
def s3_options() -> Iterator[dict[str, dict[str, Any]]]:
    """An empty bucket ``data``; this process is configured to use it. Yields the storage options for other processes.

    Use as ``from tests.common.s3 import s3_options  # noqa: F401`` in a test module or its conftest.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    options = {"s3": {"key": "test", "secret": "test", "endpoint_url": url}}
    # Servers of one process share what they store.
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    configure_storage(options)
    try:
        fsspec.filesystem("s3", **options["s3"]).mkdir(BUCKET)
        yield options
    finally:
        configure_storage({})
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()
