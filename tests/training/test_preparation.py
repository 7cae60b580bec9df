"""Preparing generations in the background, and what training waits for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import UserError
from megatron_groupmates.pool.contexts import Packing
from megatron_groupmates.pool.generation import generation_path, load_generation, publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry, read_log
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.training import adoption, preparation
from megatron_groupmates.training.adoption import GenerationAdopter
from megatron_groupmates.training.live_order import LiveOrder
from megatron_groupmates.training.preparation import Preparation, prepare_generation
from tests.common.configs import tiny_config
from tests.pool.helpers import make_pool
from tests.training.thread_ranks import ThreadRanks

LONG = 120.0  # seconds that nothing here takes, however busy the machine


@pytest.fixture
def pool(tmp_path: Path) -> PoolIndex:
    return make_pool(tmp_path / "pool", (20, 20))


def fail(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (UserError("rows.bin is damaged"), "rows.bin is damaged"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        (MemoryError("cannot allocate"), "MemoryError: cannot allocate"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_goes_wrong_in_the_thread_is_a_problem(error: Exception, problem: str) -> None:
    failed = Preparation(3, lambda: fail(error))
    assert failed.wait(LONG)
    assert (failed.number, failed.generation, failed.problem) == (3, None, problem)


def test_the_work_goes_on_beside_its_maker() -> None:
    go_on, done = threading.Event(), object()
    waiting = Preparation(1, lambda: (go_on.wait(LONG), done)[1])
    assert not waiting.wait() and not waiting.wait(0.05)
    go_on.set()
    assert waiting.wait(LONG)
    assert waiting.generation is done and waiting.problem is None and waiting.seconds > 0


def test_a_process_that_ends_does_not_wait_for_its_thread() -> None:
    """Busy in numpy, and stuck in a call that never comes back."""
    code = (
        "import numpy as np, time\n"
        "from megatron_groupmates.pool.order import permute\n"
        "from megatron_groupmates.training.preparation import Preparation\n"
        "busy = Preparation(1, lambda: [permute(np.arange(200_000), 10**9, key) for key in range(10**6)])\n"
        "stuck = Preparation(2, lambda: time.sleep(3600))\n"
        "time.sleep(0.3)\n"
        "assert not busy.wait() and not stuck.wait()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=LONG)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_generation_of_nothing_but_excluded_samples_is_refused(pool: PoolIndex, tmp_path: Path) -> None:
    write_generation(tmp_path, 1, pool, np.arange(5), {})
    masks = {0: np.ones(40, dtype=bool)}
    order = SampleOrder(40, 0, [LogEntry(0, 0, 0, "0")], masks, excluded=np.arange(40) < 10)
    with pytest.raises(UserError, match=r"generation 1 selects nothing to train on: what data\.exclude leaves of it"):
        prepare_generation(tmp_path, 1, pool, order, 0)
    write_generation(tmp_path, 2, pool, np.arange(5, 15), {})
    assert prepare_generation(tmp_path, 2, pool, order, 8).num_samples == 10


@pytest.mark.parametrize("context_length", [None, 20])
def test_another_process_prepares_the_same(
    pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context_length: int | None
) -> None:
    """As for a large pool; what is wrong with a generation comes back word for word."""
    write_generation(tmp_path, 1, pool, np.arange(0, 40, 3), {})
    packing = Packing(pool.lengths, context_length)
    orders = [SampleOrder(40, 0, [LogEntry(0, 0, 0, "0")], {0: np.ones(40, dtype=bool)}, packing, np.arange(40) < 3) for _ in range(2)]
    here = prepare_generation(tmp_path, 1, pool, orders[0], 10)
    monkeypatch.setattr(preparation, "_FEW_SAMPLES", 0)
    there = prepare_generation(tmp_path, 1, pool, orders[1], 10)
    assert (there.number, there.num_samples, there.digest) == (here.number, here.num_samples, here.digest) == (1, 14, here.digest)
    assert there.rows.tolist() == here.rows.tolist() and there.served.tolist() == here.served.tolist()
    extended = [order.extended(LogEntry(1, 12, 0, "1"), found.rows) for order, found in zip(orders, (here, there), strict=True)]
    last = extended[0].exhausted_at()
    assert extended[1].exhausted_at() == last
    assert extended[0].contexts(0, last).rows.tolist() == extended[1].contexts(0, last).rows.tolist()
    with pytest.raises(UserError, match="there is no generation 2"):
        prepare_generation(tmp_path, 2, pool, orders[1], 10)


def test_a_process_that_dies_is_a_problem(pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = SampleOrder(40, 0, [LogEntry(0, 0, 0, "0")], {0: np.ones(40, dtype=bool)})
    monkeypatch.setattr(preparation, "_FEW_SAMPLES", 0)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="the process that prepares generation 1 ended with exit code 1"):
        prepare_generation(tmp_path, 1, pool, order, 0)


class Run:
    """A run directory, and one rank's adopter in it."""

    def __init__(
        self, root: Path, pool: PoolIndex, monkeypatch: pytest.MonkeyPatch, packing: Packing | None = None, **selection: Any
    ) -> None:
        self.selection = root / "run/selection"
        self.pool = pool
        for number, rows in ((0, None), (1, np.arange(0, 40, 2)), (2, np.arange(0, 40, 3)), (3, np.array([7]))):
            write_generation(self.selection, number, pool, rows, {})
        append_entry(self.selection / "log.jsonl", LogEntry(0, 0, 0, load_generation(self.selection, 0, pool).digest))
        publish(self.selection, 0)
        masks = {0: np.ones(40, dtype=bool)}
        self.order = LiveOrder(40, 0, read_log(self.selection / "log.jsonl"), masks, lambda entry: None, packing=packing)
        self.events: list[dict[str, Any]] = []
        self.config = tiny_config(
            run={"output_dir": str(root / "run")},
            selection={"method": "random", "first_refresh_step": 2, "refresh_interval": 4, "poll_interval_steps": 1, **selection},
        )
        self._ranks = ThreadRanks(1)
        monkeypatch.setattr(adoption, "dist", self._ranks)
        self._ranks.run(self._open)

    def _open(self, groups: Any) -> None:
        self.adopter = GenerationAdopter(self.config, self.pool, self.order, groups, self.events.append)

    def boundary(self, step: int) -> float:
        """Go through this boundary; returns the seconds that it took."""
        started = time.monotonic()
        self._ranks.run(lambda groups: self.adopter.at_step_boundary(step, 4 * step))
        return time.monotonic() - started

    def prepared(self) -> None:
        """Wait for the thread that prepares a generation."""
        assert self.adopter._preparation.wait(LONG)

    @property
    def log(self) -> list[tuple[int, int]]:
        return [(entry.generation, entry.effective_sample) for entry in read_log(self.selection / "log.jsonl")]


def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Preparations end only after the event is set: whoever waits for one before would wait for ever."""
    go_on, work = threading.Event(), prepare_generation

    def prepare(*arguments: Any) -> Any:
        assert go_on.wait(LONG)
        return work(*arguments)

    monkeypatch.setattr(adoption, "prepare_generation", prepare)
    return go_on


def test_training_goes_on_while_a_generation_is_prepared(pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one published meanwhile comes after it; the first boundary of a start waits instead."""
    run = Run(tmp_path, pool, monkeypatch)
    run.boundary(0)
    go_on = hold(monkeypatch)
    publish(run.selection, 1)
    run.boundary(1)
    publish(run.selection, 2)
    held = run.boundary(2)
    assert run.log == [(0, 0)]
    go_on.set()
    run.prepared()
    stood = [run.boundary(3)]
    go_on.clear()
    run.boundary(4)
    time.sleep(0.1)
    go_on.set()
    run.prepared()
    stood.append(run.boundary(5))
    assert run.log == [(0, 0), (1, 12), (2, 20)]
    assert [(event["event"], event["step"], event["generation"]) for event in run.events] == [("adoption", 3, 1), ("adoption", 5, 2)]
    for event, seconds, least in zip(run.events, stood, (held, 0.1), strict=True):
        # Both are written to the millisecond.
        assert event["prepare_seconds"] > least - 0.001 and event["seconds"] < seconds + 0.001

    again = Run(tmp_path / "again", pool, monkeypatch)
    go_on.clear()
    publish(again.selection, 1)
    threading.Timer(0.1, go_on.set).start()
    again.boundary(0)
    assert again.log == [(0, 0), (1, 0)]


def test_a_boundary_that_must_have_the_generation_waits_for_the_thread(
    pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, pool, monkeypatch, mode="blocking")
    run.boundary(0)
    go_on = hold(monkeypatch)
    publish(run.selection, 1)
    run.boundary(1)  # not due yet
    threading.Timer(0.1, go_on.set).start()
    run.boundary(2)
    assert run.log == [(0, 0), (1, 8)]


def test_a_wait_for_the_thread_ends_with_the_time_out(pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is adopted all the same, when it is ready."""
    run = Run(tmp_path, pool, monkeypatch, mode="blocking", wait_timeout_seconds=0.2)
    run.boundary(0)
    go_on = hold(monkeypatch)
    publish(run.selection, 1)
    run.boundary(2)
    run.boundary(3)
    assert run.log == [(0, 0)]
    ended = [(event["event"], event["reason"]) for event in run.events]
    assert ended == [("wait_ended", "was not prepared within 0.2 s")], "the wait is given up once"
    go_on.set()
    run.prepared()
    run.boundary(4)
    assert run.log == [(0, 0), (1, 16)]


def test_a_bad_generation_is_not_waited_for_again(
    pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused at the boundary that needs it; the next round's is adopted."""
    run = Run(tmp_path, pool, monkeypatch, mode="blocking", wait_timeout_seconds=LONG)
    (generation_path(run.selection, 1) / "rows.bin").write_bytes(b"rubbish")
    publish(run.selection, 1)
    run.boundary(2)
    run.boundary(3)
    assert run.log == [(0, 0)]
    assert sum("generation 1 is refused, training goes on with 0" in text and "rows.bin" in text for text in caplog.messages) == 1
    publish(run.selection, 2)
    run.boundary(6)
    assert run.log == [(0, 0), (2, 24)]


def test_a_generation_too_small_for_one_context_is_refused(
    pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """9 tokens are no context of 20."""
    run = Run(tmp_path, pool, monkeypatch, packing=Packing(pool.lengths, 20))
    publish(run.selection, 3)
    run.boundary(0)
    assert run.log == [(0, 0)]
    assert any("generation 3 is refused" in text and "fills no training sequence" in text for text in caplog.messages)
