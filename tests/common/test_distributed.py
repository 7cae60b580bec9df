"""The harness reports what it must: results, tracebacks, signals, exits and hangs, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.common.distributed import RankFailure, run_ranks


def sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, float, int, str]:
    total = torch.tensor(float(rank + offset))
    torch.distributed.all_reduce(total)
    return rank, float(total), torch.get_num_threads(), f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"


def misbehave(rank: int, world_size: int, how: str, directory: str) -> None:
    Path(directory, f"pid-{rank}").write_text(str(os.getpid()))
    torch.distributed.barrier()
    if rank == 1:
        if how == "raise":
            raise ValueError("the tensor on this rank is wrong")
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        if how == "system exit":
            raise SystemExit(0)
        if how == "collective":
            return
    elif how == "collective":
        torch.distributed.barrier()
    time.sleep(3600)


def assert_gone(directory: Path) -> None:
    for path in directory.glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_results_are_collected_by_rank(tmp_path):
    assert run_ranks(sum_of_ranks, 2, 10, tmp_path=tmp_path) == [(0, 21.0, 1, "0/2"), (1, 21.0, 1, "1/2")]


def test_environment_of_the_parent_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    before = dict(os.environ)
    run_ranks(sum_of_ranks, 1, 0, tmp_path=tmp_path)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "(?s)rank 1 of 2 failed:.*in misbehave.*ValueError: the tensor on this rank is wrong"),
        ("signal", "rank 1 of 2 died without a traceback: signal SIGKILL"),
        ("exit", "rank 1 of 2 died without a traceback: exit code 7"),
        ("system exit", "(?s)rank 1 of 2 failed:.*SystemExit: 0"),
    ],
)
def test_a_failing_rank_is_reported_and_its_siblings_killed(tmp_path, how, message):
    # At the end of the time allowed, the error would be another.
    with pytest.raises(RankFailure, match=message):
        run_ranks(misbehave, 2, how, str(tmp_path), tmp_path=tmp_path)
    assert_gone(tmp_path)


def leave_silently(rank: int, world_size: int) -> None:
    os._exit(0)


def test_an_exit_with_code_zero_without_a_result_is_a_failure(tmp_path):
    with pytest.raises(RankFailure, match=r"rank\(s\) \[0\] of 1 ended with exit code 0 without returning"):
        run_ranks(leave_silently, 1, tmp_path=tmp_path)


def test_a_hang_is_reported_with_its_ranks(tmp_path):
    with pytest.raises(RankFailure, match=r"rank\(s\) \[0, 1\] of 2 still running after 2 s"):
        run_ranks(misbehave, 2, "hang", str(tmp_path), tmp_path=tmp_path, timeout_seconds=2)
    assert_gone(tmp_path)


def test_a_rank_that_leaves_a_collective_alone_fails_it(tmp_path):
    with pytest.raises(RankFailure, match=r"(?s)rank 0 of 2 failed:.*barrier"):
        run_ranks(misbehave, 2, "collective", str(tmp_path), tmp_path=tmp_path, collective_timeout_seconds=60)
