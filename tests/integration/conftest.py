"""Hosts for the tests of this directory, where they are asked for and this machine can play them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.hosts import Hosts, why_not


@pytest.fixture(scope="module")
def hosts(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts; the tests of a module share them."""
    reason = why_not() if pytestconfig.getoption("--several-hosts") else "starts whole jobs on several hosts: pytest --several-hosts"
    if reason is not None:
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as several:
        yield several
