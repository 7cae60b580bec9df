"""Work that oracle workers share: cut into chunks, claimed one by one, each written when done."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_groupmates.config import UserError
from megatron_groupmates.server.chunk_files import ArrayFiles, ChunkFiles, Range
from megatron_groupmates.server.context import Arrays, RoundContext, write_server_state
from megatron_groupmates.utils.progress import progress_bar

Compute = Callable[[int, int, Callable[[int], object]], Arrays]
"""(first item, one past the last, call with the number of items done since) -> arrays with a row for each item."""

_KINDS = ("step", "evaluation", "restore")
_STATE_SECONDS = 2.0  # between two updates of server.json, each of which waits for the disk


class Chunks:
    """Items that oracle workers share chunk by chunk; each is written when done, so that a killed server loses one per worker.

    A worker claims the next chunk when it has finished one, so that a slow one holds up the others for a chunk at most. What
    an item gives must not depend on who computes it, when, or in which chunk. A file's name says which items it holds:
    chunks of another size, left by an earlier run of the round, are used, and what lies between them is computed.
    """

    def __init__(
        self,
        context: RoundContext,
        name: str,
        total: int,
        size: int,
        ragged: Collection[str] = (),
        files: ChunkFiles | None = None,
    ) -> None:
        """Chunks of ``size`` of ``total`` items, kept in the round's directory ``name``; the size may change in between.

        They are :class:`ArrayFiles`, some of whose arrays may be ``ragged``, unless ``files`` are given.
        """
        self._context, self._name, self._total, self._size = context, name, total, size
        self._files = ArrayFiles(context.directory / name, ragged) if files is None else files

    def work(self, compute: Compute, unit: str, tokens_per_item: float | None = None) -> None:
        """Compute what is missing; ``server.json`` tells how far it has come. Collective.

        Args:
            compute: all ranks of a tensor-parallel group call it together; a UserError of one worker ends the work of all.
            unit: name of one item.
            tokens_per_item: that the models read for one item on average; when given, the stage's ``rates`` are recorded.

        Raises:
            UserError: on every rank, whichever raised it.
        """
        groups, stopwatch = self._context.groups, self._context.stopwatch
        # Rank 0's view for all, and counters for this call alone: those of the store outlive stages, rounds and failures.
        kept, token = groups.broadcast_object((self._files.kept(self._total), uuid.uuid4().hex) if groups.is_main else None)
        missing = missing_ranges(kept, self._total, self._size)
        if not missing:
            return
        num_items = sum(stop - first for first, stop in missing)
        label = f"round {self._context.input.number}: {self._name.replace('_', ' ')}"
        stopwatch.reset()
        started = time.monotonic()
        with progress_bar(self._total, label, unit=unit, initial=self._total - num_items, enabled=groups.is_main) as bar:
            progress = _Progress(self._context, self._name, unit, self._total, num_items, bar)
            self._context.together(lambda: self._take(compute, missing, f"chunks/{token}", progress))
            progress.show(num_items)
        if tokens_per_item is not None:
            workers: list[dict[str, float] | None] = [None] * groups.world_size
            dist.all_gather_object(workers, stopwatch.seconds if groups.tensor_rank == 0 else None)
            seconds = time.monotonic() - started
            self._context.rates = rates(num_items, tokens_per_item, seconds, [worker for worker in workers if worker is not None])

    def collect(self) -> Arrays:
        """What the stage keeps: all items in order, where they are in :class:`ArrayFiles`. Call when :meth:`work` is done."""
        return self._files.collect(self._total)

    def _take(self, compute: Compute, missing: list[Range], counters: str, progress: _Progress) -> None:
        """One worker: claim and compute until nothing is left."""
        groups = self._context.groups

        def done(count: int) -> None:
            if groups.tensor_rank == 0:
                progress.show(groups.add_to_counter(f"{counters}/done", count))

        try:
            while (number := groups.take_number(f"{counters}/claimed")) < len(missing):
                first, stop = missing[number]
                arrays = compute(first, stop, done)
                if groups.tensor_rank == 0:
                    self._files.write(first, stop, arrays)
        except UserError:
            # Nothing is left to claim: the round fails, and what the others would still do is done when it is repeated.
            groups.add_to_counter(f"{counters}/claimed", len(missing))
            raise


def missing_ranges(kept: list[Range], total: int, size: int) -> list[Range]:
    """What of ``0 .. total - 1`` the ``kept`` ranges (disjoint, in order) leave out, in pieces of at most ``size``."""
    bounds = [0, *(bound for part in kept for bound in part), total]
    gaps = zip(bounds[::2], bounds[1::2], strict=True)
    return [(first, min(first + size, end)) for begin, end in gaps for first in range(begin, end, size)]


def rates(num_items: int, tokens_per_item: float, seconds: float, workers: list[dict[str, float]]) -> dict[str, Any]:
    """What a stage's ``stage.json`` tells of its speed; an item is a rollout, of one sample where samples are labelled singly.

    Args:
        num_items: done in this run.
        tokens_per_item: that the models read for one item.
        seconds: from the first claim to the end of the slowest worker.
        workers: each worker's seconds by kind of work; ``share`` is of the time of all of them.
    """
    return {
        "rollouts_per_second": num_items / seconds,
        "tokens_per_second": num_items * tokens_per_item / seconds,
        "share": {kind: sum(worker.get(kind, 0.0) for worker in workers) / (seconds * len(workers)) for kind in _KINDS},
    }


class _Progress:
    """All workers' progress as the main rank shows it: the bar, and ``server.json`` for ``status``."""

    def __init__(self, context: RoundContext, name: str, unit: str, total: int, num_items: int, bar: tqdm) -> None:
        """``num_items`` of ``total`` are to be done in this run."""
        self._context, self._name, self._unit, self._total, self._bar = context, name, unit, total, bar
        self._earlier, self._shown = total - num_items, 0
        self._started, self._written = time.monotonic(), float("-inf")
        self.show(0)

    def show(self, done: int) -> None:
        """``done`` items of this run's are done by all workers together. Does nothing but on the main rank."""
        now = time.monotonic()
        self._bar.update(done - self._shown)
        self._shown = done
        if now - self._written < _STATE_SECONDS:
            return
        self._written = now
        rate = done / (now - self._started) if done else None
        write_server_state(
            self._context,
            self._name,
            done=self._earlier + done,
            total=self._total,
            unit=self._unit,
            per_second=rate,
            eta_seconds=None if rate is None else (self._total - self._earlier - done) / rate,
        )
