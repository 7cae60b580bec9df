"""The same function on many tasks, in worker processes that each do a whole task by themselves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_handles
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.storage import configure_storage, storage_options

_POLL_SECONDS = 0.2
_STOPPED = -1

Advance = Callable[[int], None]


class _StoppedError(Exception):
    """Another worker failed: this one gives up its task."""


def run_tasks(
    function: Callable[[Any, Any, Advance], None],
    context: Any,
    tasks: Iterable[Any],
    num_workers: int,
    *,
    on_advance: Advance,
    on_done: Callable[[], None],
) -> None:
    """Call ``function(context, task, advance)`` for each task; ``advance(amount)`` tells how far it has come.

    Args:
        function: a module's function. Tasks are independent of each other.
        context: given to every call; sent to each worker once.
        tasks: begun in this order.
        num_workers: processes, 0 to work in this one.
        on_advance: called here with amounts of progress.
        on_done: called here after each task that is finished.

    Raises:
        UserError: a worker was killed.
        Exception: whatever ``function`` or a callback raises first. The other workers give up their tasks soon after.
    """
    if num_workers == 0:
        for task in tasks:
            function(context, task, on_advance)
            on_done()
        return
    spawn = multiprocessing.get_context("spawn")  # not forked: threads do not survive a fork
    counter = spawn.Value("q", 0)
    executor = ProcessPoolExecutor(num_workers, spawn, _start_worker, (function, context, counter, storage_options()))
    try:
        _run(executor, iter(tasks), 2 * num_workers, counter, on_advance, on_done)
    except BrokenProcessPool as error:
        raise UserError(f"a worker process was killed, probably for want of memory; use fewer than {num_workers} --workers") from error
    finally:
        counter.value = _STOPPED  # of no consequence when all tasks are finished
        executor.shutdown(cancel_futures=True)


def _run(executor: ProcessPoolExecutor, tasks: Any, num_in_flight: int, counter: Any, on_advance: Advance, on_done: Callable) -> None:
    reported, in_flight = 0, set[Future[None]]()
    while True:
        while len(in_flight) < num_in_flight and (task := next(tasks, None)) is not None:
            in_flight.add(executor.submit(_work, task))
        if not in_flight:
            return
        done, in_flight = wait(in_flight, _POLL_SECONDS, FIRST_COMPLETED)
        position = counter.value
        on_advance(position - reported)
        reported = position
        for future in done:
            future.result()
            on_done()


_state: tuple[Callable[[Any, Any, Advance], None], Any, Any] | None = None


def _start_worker(function: Callable[[Any, Any, Advance], None], context: Any, counter: Any, storage: dict) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business: it stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core
    configure_storage(storage)
    _state = (function, context, counter)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_handles([parent.sentinel])
    os._exit(1)


def _work(task: Any) -> None:
    assert _state is not None
    function, context, counter = _state

    def advance(amount: int) -> None:
        with counter.get_lock():
            if counter.value == _STOPPED:
                raise _StoppedError
            counter.value += amount

    function(context, task, advance)
