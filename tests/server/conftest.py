"""One trained run and one world of a single rank for the server's tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.common.gpt_runs import TrainedRun, one_rank, trained_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained_run(1, tmp_path_factory)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with one_rank(tmp_path_factory.mktemp("group")) as opened:
        yield opened
