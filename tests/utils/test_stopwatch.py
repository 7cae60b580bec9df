"""Seconds by kind of work."""

from __future__ import annotations

import time

import pytest

from megatron_groupmates.utils.stopwatch import Stopwatch


def test_adds_up_by_name():
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.timing("step"):
            time.sleep(0.01)
    started = time.perf_counter()
    with stopwatch.timing("restore"):
        pass
    elapsed = time.perf_counter() - started
    assert set(stopwatch.seconds) == {"step", "restore"}
    assert stopwatch.seconds["step"] >= 0.02 and 0 <= stopwatch.seconds["restore"] <= elapsed


def test_work_that_fails_counts():
    stopwatch = Stopwatch()
    with pytest.raises(ZeroDivisionError), stopwatch.timing("step"):
        raise ZeroDivisionError
    assert "step" in stopwatch.seconds
