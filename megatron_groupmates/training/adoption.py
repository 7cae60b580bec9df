"""Adopting new generations at step boundaries, through the generation log (contract C4)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupmates.config import Config, RunPaths, UserError, refresh_steps
from megatron_groupmates.parallel import Job, ParallelGroups
from megatron_groupmates.pool.exclusion import Exclusion
from megatron_groupmates.pool.generation import POINTER_FILE, Generation, load_generation, publish, read_pointer, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry, read_log
from megatron_groupmates.training.live_order import LiveOrder
from megatron_groupmates.training.preparation import Preparation, prepare_generation
from megatron_groupmates.utils.files import atomic_directory, write_text
from megatron_groupmates.utils.run_directory import generation_log_source

logger = logging.getLogger(__name__)

_WAIT_SLICE_SECONDS = 10.0  # below any collective's timeout, so that waiting ranks never look hung


def open_generation_log(
    config: Config, pool: PoolIndex, exclusion: Exclusion, groups: ParallelGroups, consumed_train_samples: int
) -> tuple[tuple[LogEntry, ...], dict[int, np.ndarray]]:
    """The run's log and the masks of its generations.

    A fresh run starts with generation 0, the whole pool but for the excluded samples; a run that branches from another
    inherits the part of its log that the consumed samples depend on. Collective: every rank must call; rank 0 writes.

    Raises:
        UserError: a generation of the log is missing, damaged or of another pool, or generation 0 was made with another
            exclusion.
    """
    if groups.is_main:
        start_generation_log(config, pool, exclusion, consumed_train_samples)
    groups.barrier()
    return read_generation_log(config, pool, exclusion, consumed_train_samples)


def read_generation_log(
    config: Config, pool: PoolIndex, exclusion: Exclusion, consumed_train_samples: int
) -> tuple[tuple[LogEntry, ...], dict[int, np.ndarray]]:
    """The log that :func:`start_generation_log` has begun, and the masks of its generations; any rank may call by itself.

    Raises:
        UserError: as :func:`open_generation_log`, or the log begins after the consumed samples.
    """
    paths = RunPaths.of(config)
    entries = read_log(paths.generation_log)
    if entries[0].effective_sample > consumed_train_samples:
        raise UserError(
            f"{paths.generation_log} begins at sample {entries[0].effective_sample}, where selection was switched on, but training "
            f"goes on from sample {consumed_train_samples}, before it; go on from a later checkpoint, or start with a new directory"
        )
    generations = {number: _load_logged(paths, number, entries, pool) for number in {entry.generation for entry in entries}}
    _check_exclusion(paths, generations[0], exclusion)
    return entries, {number: generation.mask for number, generation in generations.items()}


def start_generation_log(config: Config, pool: PoolIndex, exclusion: Exclusion, consumed_train_samples: int, first_sample: int = 0) -> None:
    """Begin the run's log where it has none; rank 0 alone calls.

    Args:
        config: the run.
        pool: its pool.
        exclusion: its exclusion.
        consumed_train_samples: the part of the log of a run that this one branches from is inherited up to there.
        first_sample: where a log that inherits nothing begins: the samples before it did not come from the pool.
    """
    paths = RunPaths.of(config)
    if read_log(paths.generation_log):
        return
    parent = generation_log_source(config)
    inherited = tuple(entry for entry in read_log(parent.generation_log) if entry.effective_sample < consumed_train_samples)
    for number in sorted({entry.generation for entry in inherited}):
        name = f"generation-{number:06d}"
        if not (paths.selection / name).exists():
            with atomic_directory(paths.selection / name) as partial:
                shutil.copytree(parent.selection / name, partial, dirs_exist_ok=True)
    if not inherited:
        if not (paths.selection / "generation-000000").exists():
            rows = None if exclusion.mask is None else np.flatnonzero(~exclusion.mask)
            write_generation(paths.selection, 0, pool, rows, {"method": "all", "seed": config.run.seed, **exclusion.provenance})
        digest = load_generation(paths.selection, 0, pool).digest
        inherited = (LogEntry(generation=0, effective_sample=first_sample, epoch=0, digest=digest),)
    write_text(paths.generation_log, "".join(json.dumps(dataclasses.asdict(entry)) + "\n" for entry in inherited))
    if not (paths.selection / POINTER_FILE).exists():
        publish(paths.selection, inherited[-1].generation)


def _check_exclusion(paths: RunPaths, whole: Generation, exclusion: Exclusion) -> None:
    """Refuse to go on with another exclusion than generation 0 was made with."""
    made_with = whole.provenance.get("exclusion", {}).get("digest", "")
    if made_with != exclusion.digest:
        raise UserError(
            f"data.exclude: its digest is {exclusion.digest[:16] or 'that of no file'}, but {paths.selection} began with "
            f"{made_with[:16] or 'no exclusion'}; give the same file, or start a new run"
        )


def _load_logged(paths: RunPaths, number: int, entries: tuple[LogEntry, ...], pool: PoolIndex) -> Generation:
    generation = load_generation(paths.selection, number, pool)
    (digest,) = {entry.digest for entry in entries if entry.generation == number}
    if digest != generation.digest:
        raise UserError(
            f"{paths.generation_log} refers to generation {number} with digest {digest}, but {paths.selection} holds one "
            f"with digest {generation.digest}; restore the generation the log was written with"
        )
    return generation


class GenerationAdopter:
    """Looks for new generations at step boundaries and switches every rank at the same global sample.

    A generation that turns up is prepared in the background on every rank (:mod:`~megatron_groupmates.training.preparation`)
    and adopted at the first look that finds all ranks ready; a newer one published meanwhile comes after it. Only the
    first boundary of a start and one where training must not run on wait for the preparation.

    Args:
        config: the run.
        pool: the run's pool.
        order: the order to extend.
        groups: the trainer's ranks.
        on_event: called on every rank with a metrics row for each adoption or fruitless wait. An adoption's ``seconds``
            is how long training stood still for it, ``prepare_seconds`` what this rank did in the background.
    """

    def __init__(
        self,
        config: Config,
        pool: PoolIndex,
        order: LiveOrder,
        groups: Job,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self._paths = RunPaths.of(config)
        self._pool = pool
        self._order = order
        self._groups = groups
        self._on_event = on_event
        self._refused: set[int] = set()
        self._given_up: set[int] = set()
        self._preparation: Preparation | None = None
        self._starting = True

    def at_step_boundary(self, step: int, issued_samples: int) -> None:
        """Adopt the newest generation if there is one and it is prepared, after waiting for it where the mode says so.

        Collective: every rank must call before each step with its own ``issued_samples``, how far its loader has
        read ahead; the generation takes effect behind the farthest. The first call must come before the loader starts
        its processes.
        """
        starting, self._starting = self._starting, False
        due, deadline = self._due(step), time.monotonic() + self._config.selection.wait_timeout_seconds
        if due is None and step % self._config.selection.poll_interval_steps:
            return
        while True:
            if self._preparation is None:
                number = self._await_generation(step, due, deadline)
                if number is None:
                    return
                self._start_preparation(number, issued_samples)
                if due is None and not starting:
                    return  # looked at again at a later boundary, however quick it is: when to adopt must not be a race
            stalled = time.monotonic()
            # At the start no step is held up, and a loader's processes must not be forked beside the thread.
            if not self._all_prepared(math.inf if starting else deadline if due is not None else stalled):
                if due is not None:
                    self._give_up(step, due, f"was not prepared within {self._config.selection.wait_timeout_seconds:g} s", stalled)
                return
            self._adopt(step, issued_samples, stalled)
            due = self._due(step)
            if due is None:
                return

    def awaits_inline_round(self, step: int) -> bool:
        """Inline mode: whether the trainer must end now, at a refresh whose round has not run. The same on every rank."""
        # Mode and due generation are the same on every rank; only what lies on disk needs asking rank 0.
        due = self._due(step)
        if self._config.selection.mode != "inline" or due is None:
            return False
        return self._groups.broadcast_object(self._newest() is None and not self._failed(due))

    def _due(self, step: int) -> int | None:
        """The generation that training must not run on without at ``step``; None when there is none or it was given up."""
        selection = self._config.selection
        slack = 0 if selection.mode != "async" else selection.max_staleness_steps
        if slack is None:
            return None
        started = [number for number, at in enumerate(refresh_steps(self._config), start=1) if at + slack <= step]
        due = started[-1] if started else 0
        return due if due > self._order.generation and due not in self._given_up else None

    def _newest(self) -> int | None:
        """Number of the published generation, None when it is no newer than the one in force. Meant for rank 0."""
        try:
            number = read_pointer(self._paths.selection)
        except (UserError, OSError) as error:
            # A server that misbehaves must never stop training.
            logger.warning(
                "the selection pointer cannot be read, training goes on with generation %d: %s",
                self._order.generation,
                error,
            )
            return None
        return number if number is not None and number > self._order.generation and number not in self._refused else None

    def _failed(self, number: int) -> bool:
        return self._paths.round_failure(number).exists()

    def _await_generation(self, step: int, due: int | None, deadline: float) -> int | None:
        """Rank 0's look at the pointer, on every rank; with ``due``, repeated until it is published, has failed or time is up."""
        started, told = time.monotonic(), False
        while True:
            number, state = None, "go on"
            if self._groups.is_main:
                number, state = self._poll(due, deadline)
            number, state = self._groups.broadcast_object((number, state))
            if state != "wait":
                break
            if not told:
                logger.info("step %d: waiting for generation %d of the selection server", step, due)
                told = True
        if due is not None and (number is None or number < due):
            self._give_up(step, due, state, started)
        return number

    def _give_up(self, step: int, due: int, reason: str, started: float) -> None:
        self._given_up.add(due)
        logger.warning("step %d: generation %d %s; training goes on with generation %d", step, due, reason, self._order.generation)
        seconds = round(time.monotonic() - started, 3)
        self._on_event({"step": step, "event": "wait_ended", "generation": due, "reason": reason, "seconds": seconds})

    def _poll(self, due: int | None, deadline: float) -> tuple[int | None, str]:
        """Rank 0: look until something is decided or a slice of waiting is over."""
        slice_end = time.monotonic() + _WAIT_SLICE_SECONDS
        while True:
            number = self._newest()
            if due is None or (number is not None and number >= due):
                return number, "go on"
            if self._failed(due):
                return number, "failed on the server"
            if self._config.selection.mode == "inline":
                return number, "was not made"
            if time.monotonic() > deadline:
                return number, f"did not come within {self._config.selection.wait_timeout_seconds:g} s"
            if time.monotonic() > slice_end:
                return number, "wait"
            time.sleep(0.2)

    def _start_preparation(self, number: int, issued_samples: int) -> None:
        selection, pool, order = self._paths.selection, self._pool, self._order.current
        self._preparation = Preparation(number, lambda: prepare_generation(selection, number, pool, order, issued_samples))

    def _all_prepared(self, deadline: float) -> bool:
        """Whether every rank's thread is done, after waiting for it until ``deadline`` on rank 0's clock; the same on every rank.

        Collective: every rank must call.
        """
        assert self._preparation is not None
        while True:
            # In slices: no rank may sit in the collective for as long as a slow disk of another takes.
            done = self._preparation.wait(min(max(deadline - time.monotonic(), 0.0), _WAIT_SLICE_SECONDS))
            over = self._groups.is_main and time.monotonic() >= deadline
            votes = torch.tensor([done, not over], dtype=torch.int32, device=self._groups.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MIN)
            all_done, wait_on = votes.tolist()
            if all_done or not wait_on:
                return bool(all_done)

    def _adopt(self, step: int, issued_samples: int, stalled: float) -> None:
        """Agree on the prepared generation and where it begins, commit on rank 0, then use."""
        preparation, self._preparation = self._preparation, None
        assert preparation is not None
        number, generation = preparation.number, preparation.generation
        reports: list[Any] = [None] * self._groups.world_size
        dist.all_gather_object(reports, (preparation.problem, issued_samples, generation.digest if generation else None))
        problem = _first_problem(reports)
        if problem is not None or generation is None:
            self._refuse(number, str(problem))
            return
        batch = self._config.training.global_batch_size
        frontier = max([issued for _, issued, _ in reports] + [self._order.current.entries[-1].effective_sample])
        effective_sample = -(-frontier // batch) * batch
        self._order.ensure(effective_sample)
        last = self._order.current.entries[-1]
        entry = LogEntry(
            generation=number,
            effective_sample=max(effective_sample, last.effective_sample),
            epoch=last.epoch,
            digest=generation.digest,
        )
        try:
            extended = self._order.current.extended(entry, generation.rows)
        except UserError as error:  # the same on every rank: it depends on nothing but entry and mask
            self._refuse(number, str(error))
            return
        if self._groups.is_main:
            append_entry(self._paths.generation_log, entry)
        self._groups.barrier()
        self._order.adopt(extended, generation.rows)
        logger.info(
            "step %d: generation %d (%d samples) takes effect at sample %d",
            step,
            number,
            generation.num_samples,
            entry.effective_sample,
        )
        self._on_event(
            {
                "step": step,
                "event": "adoption",
                "generation": number,
                "effective_sample": entry.effective_sample,
                "prepare_seconds": round(preparation.seconds, 3),
                "seconds": round(time.monotonic() - stalled, 3),
            }
        )

    def _refuse(self, number: int, problem: str) -> None:
        self._refused.add(number)
        self._given_up.update(range(self._order.generation + 1, number + 1))  # nothing to wait for: it is there, and bad
        logger.warning("generation %d is refused, training goes on with %d: %s", number, self._order.generation, problem)


def _first_problem(reports: list[Any]) -> str | None:
    """Why ranks cannot adopt together, from their (problem, issued samples, digest); None where they can."""
    for rank, (problem, _, _) in enumerate(reports):
        if problem is not None:
            return problem if rank == 0 else f"rank {rank}: {problem}"
    digests = [digest for _, _, digest in reports]
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    return None if other is None else f"rank 0 reads it with digest {digests[0]}, rank {other} with digest {digests[other]}"
