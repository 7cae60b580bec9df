"""What is made once per session and used by many tests, also when the session's tests are spread over several processes."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.common.distributed import RankFailure


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What ``make(directory)`` returns, called in the first process of the session that asks for ``name``; others wait for it.

    Args:
        factory: of the session.
        name: of the directory, empty before.
        make: its result is pickled; what it writes into the directory nobody may change.

    Raises:
        RankFailure: the one call has raised it; it is not repeated, which would only take longer.
    """
    base = factory.getbasetemp()
    # Each worker of pytest-xdist has a directory of its own within the session's.
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    outcome = root / f"{name}.pickle"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            (root / name).mkdir()
            try:
                result: Any = make(root / name)
            except RankFailure as failure:
                result = failure
            outcome.write_bytes(pickle.dumps(result))
    result = pickle.loads(outcome.read_bytes())
    if isinstance(result, RankFailure):
        raise result
    return result
