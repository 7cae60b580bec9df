"""Run a function in several real processes that share a gloo process group."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# For what hangs: long, as a busy machine may take ten times as long as an idle one.
TIMEOUT_SECONDS, COLLECTIVE_TIMEOUT_SECONDS = 240.0, 120.0
_GRACE_SECONDS = 0.5
_launches = itertools.count()
_ROOT = Path(__file__).parents[2]
# What takes long to import, in each rank of each test: of this package the trainer, which imports no selection code.
_PRELOADED = [
    "torch.distributed",
    "deepspeed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "transformers",
    "pytest",
    "hypothesis",
    "megatron_groupmates.training.loop",
]


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message names the rank and holds its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    tmp_path: Path,
    timeout_seconds: float = TIMEOUT_SECONDS,
    collective_timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS,
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` fresh processes and collect what it returns.

    The processes are forked from a server that has imported the libraries and the trainer and done nothing else, meet
    through a ``file://`` rendezvous, and have a gloo default process group while ``function`` runs. ``RANK``,
    ``LOCAL_RANK`` and ``WORLD_SIZE`` are set, and each has one computing thread.

    Args:
        function: importable by name: top level of a module, not a lambda nor a closure.
        world_size: number of ranks.
        args: passed on, pickled.
        tmp_path: the test's directory, holds the rendezvous and the results.
        timeout_seconds: for all of it, imports included.
        collective_timeout_seconds: for each collective.

    Returns:
        The return values, by rank.

    Raises:
        RankFailure: with the traceback of the first rank that failed, or the rank and signal or exit code of one that
            died, or the ranks that did not end in time. The other ranks are killed.
    """
    work = Path(tmp_path) / f"ranks-{os.getpid()}-{next(_launches)}"
    work.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # Threads must be limited before torch is imported, hence in the environment that the server starts with; it has to
    # import the package of this checkout, from whatever directory the tests were started.
    paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    overrides = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    saved = {name: os.environ.get(name) for name in overrides}
    processes: list[BaseProcess] = []
    try:
        os.environ.update(overrides)
        for rank in range(world_size):
            process = context.Process(
                target=_child,
                daemon=False,
                name=f"rank {rank}",
                args=(function, rank, world_size, args, str(work), collective_timeout_seconds),
            )
            process.start()
            processes.append(process)
        _restore_environment(saved)
        _wait(processes, work, timeout_seconds)
    finally:
        _restore_environment(saved)
        _kill(processes)
    return [pickle.loads((work / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _child(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], work: str, collective_timeout_seconds: float
) -> None:
    """Body of one rank: set up the group, call, leave the result or the traceback in a file."""
    directory = Path(work)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        warnings.simplefilter("ignore")
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{directory / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout_seconds),
        )
        result = function(rank, world_size, *args)
        _write(directory / f"result-{rank}", pickle.dumps(result))
        torch.distributed.destroy_process_group()
    except BaseException:
        # BaseException: SystemExit from a tested entry point is a failure of the rank as well.
        _write(directory / f"failure-{rank}", traceback.format_exc().encode())
        os._exit(1)


def _write(path: Path, content: bytes) -> None:
    """Write aside and rename, so that the parent never reads half a traceback."""
    partial = path.with_name("partial-" + path.name)
    partial.write_bytes(content)
    partial.rename(path)


def _wait(processes: list[BaseProcess], work: Path, timeout_seconds: float) -> None:
    """Return when every rank ended with code 0, raise ``RankFailure`` as soon as one did not."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes):
            silent = [rank for rank in range(len(codes)) if not (work / f"result-{rank}").exists()]
            if silent:
                raise RankFailure(f"rank(s) {silent} of {len(codes)} ended with exit code 0 without returning")
            return
        if any(code not in (0, None) for code in codes):
            # A rank that breaks a collective makes its siblings fail as well: give all a moment, then report the first.
            time.sleep(_GRACE_SECONDS)
            raise RankFailure(_describe(processes, work))
        if time.monotonic() > deadline:
            late = [rank for rank, code in enumerate(codes) if code is None]
            raise RankFailure(f"rank(s) {late} of {len(processes)} still running after {timeout_seconds:g} s")
        time.sleep(0.01)


def _describe(processes: list[BaseProcess], work: Path) -> str:
    """What happened: ranks killed by a signal or by an exit without a traceback first, then the oldest traceback."""
    for rank, process in enumerate(processes):
        code, failure = process.exitcode, work / f"failure-{rank}"
        if code not in (0, None) and not failure.exists():
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return f"rank {rank} of {len(processes)} died without a traceback: {how}"
    oldest = min(work.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    return f"rank {oldest.name.rpartition('-')[2]} of {len(processes)} failed:\n{oldest.read_text()}"


def _kill(processes: list[BaseProcess]) -> None:
    """End every rank that is still there and reap it."""
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _restore_environment(saved: dict[str, str | None]) -> None:
    """Put the named environment variables back to what they were."""
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
