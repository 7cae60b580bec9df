"""Tasks on worker processes: all done, progress told, failures passed on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.workers import run_tasks
from megatron_groupmates.utils.storage import configure_storage, storage_options


def note(directory: Path, task: int, advance: Callable[[int], None]) -> None:
    advance(task)
    advance(1)
    (directory / str(task)).write_text(f"{os.getpid()} {storage_options()}")


def fail_or_wait(directory: Path, task: int, advance: Callable[[int], None]) -> None:
    if task == 0:
        while not (directory / "begun").exists():
            time.sleep(0.01)
        raise FileNotFoundError(2, "nothing there", "x")
    (directory / "begun").touch()
    for _ in range(60_000):
        time.sleep(0.01)
        advance(1)
    (directory / "to the end").touch()


def kill(_: None, task: int, advance: Callable[[int], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_task_once(tmp_path: Path, num_workers: int) -> None:
    amounts, done = [], []
    configure_storage({"s3": {"key": "k"}})
    try:
        run_tasks(note, tmp_path, range(7), num_workers, on_advance=amounts.append, on_done=lambda: done.append(None))
    finally:
        configure_storage({})
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(task) for task in range(7)]
    assert sum(amounts) == sum(range(7)) + 7 and len(done) == 7
    found = {path.read_text() for path in tmp_path.iterdir()}
    assert all("'key': 'k'" in text for text in found)
    assert {int(text.split()[0]) for text in found} == {os.getpid()} or num_workers


def test_nothing_to_do(tmp_path: Path) -> None:
    run_tasks(note, tmp_path, [], 0, on_advance=lambda _: None, on_done=lambda: None)


def test_a_failure_stops_the_others(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing there"):
        run_tasks(fail_or_wait, tmp_path, range(2), 2, on_advance=lambda _: None, on_done=lambda: None)
    assert not (tmp_path / "to the end").exists()


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(UserError, match="probably for want of memory; use fewer than 2 --workers"):
        run_tasks(kill, None, range(4), 2, on_advance=lambda _: None, on_done=lambda: None)
