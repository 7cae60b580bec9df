"""Adopting new generations at step boundaries, through the generation log (contract C4)."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_groupmates.config import Config, RunPaths, UserError, refresh_steps
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.generation import POINTER_FILE, Generation, load_generation, publish, read_pointer, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry, read_log
from megatron_groupmates.training.live_order import LiveOrder
from megatron_groupmates.utils.files import atomic_directory, write_text
from megatron_groupmates.utils.run_directory import generation_log_source

logger = logging.getLogger(__name__)

_WAIT_SLICE_SECONDS = 10.0  # below any collective's timeout, so that waiting ranks never look hung


def open_generation_log(
    config: Config, pool: PoolIndex, groups: ParallelGroups, consumed_train_samples: int
) -> tuple[tuple[LogEntry, ...], dict[int, np.ndarray]]:
    """The run's log and the masks of its generations.

    A fresh run starts with generation 0, the whole pool; a run that branches from another inherits the part of its
    log that the consumed samples depend on. Collective: every rank must call; rank 0 writes.

    Raises:
        UserError: a generation of the log is missing, damaged or of another pool.
    """
    paths = RunPaths(Path(config.run.output_dir))
    if groups.is_main and not read_log(paths.generation_log):
        _start_log(config, paths, pool, consumed_train_samples)
    groups.barrier()
    entries = read_log(paths.generation_log)
    return entries, {number: _load_logged(paths, number, entries, pool).mask for number in {entry.generation for entry in entries}}


def _start_log(config: Config, paths: RunPaths, pool: PoolIndex, consumed_train_samples: int) -> None:
    parent = generation_log_source(config)
    inherited = tuple(entry for entry in read_log(parent.generation_log) if entry.effective_sample < consumed_train_samples)
    for number in sorted({entry.generation for entry in inherited}):
        name = f"generation-{number:06d}"
        if not (paths.selection / name).exists():
            with atomic_directory(paths.selection / name) as partial:
                shutil.copytree(parent.selection / name, partial, dirs_exist_ok=True)
    if not inherited:
        if not (paths.selection / "generation-000000").exists():
            write_generation(paths.selection, 0, pool, None, {"method": "all", "seed": config.run.seed})
        inherited = (LogEntry(generation=0, effective_sample=0, epoch=0, digest=load_generation(paths.selection, 0, pool).digest),)
    write_text(paths.generation_log, "".join(json.dumps(dataclasses.asdict(entry)) + "\n" for entry in inherited))
    if not (paths.selection / POINTER_FILE).exists():
        publish(paths.selection, inherited[-1].generation)


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

    Args:
        config: the run.
        pool: the run's pool.
        order: the order to extend.
        groups: this rank's groups.
        on_event: called on every rank with a metrics row for each adoption or fruitless wait.
    """

    def __init__(
        self,
        config: Config,
        pool: PoolIndex,
        order: LiveOrder,
        groups: ParallelGroups,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config = config
        self._paths = RunPaths(Path(config.run.output_dir))
        self._pool = pool
        self._order = order
        self._groups = groups
        self._on_event = on_event
        self._refused: set[int] = set()
        self._given_up: set[int] = set()

    def at_step_boundary(self, step: int, issued_samples: int) -> None:
        """Adopt the newest generation if there is one, after waiting for it where the mode says so.

        Collective: every rank must call before each step with its own ``issued_samples``, how far its loader has
        read ahead; the generation takes effect behind the farthest.
        """
        due = self._due(step)
        if due is None and step % self._config.selection.poll_interval_steps:
            return
        number = self._await_generation(step, due)
        if number is not None:
            self._adopt(number, step, issued_samples)

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

    def _await_generation(self, step: int, due: int | None) -> int | None:
        """Rank 0's look at the pointer, on every rank; with ``due``, repeated until it is published, has failed or time is up."""
        selection = self._config.selection
        started, told = time.monotonic(), False
        while True:
            number, state = None, "go on"
            if self._groups.is_main:
                number, state = self._poll(due, started, selection.mode)
            number, state = self._groups.broadcast_object((number, state))
            if state != "wait":
                break
            if not told:
                logger.info("step %d: waiting for generation %d of the selection server", step, due)
                told = True
        if due is not None and (number is None or number < due):
            self._given_up.add(due)
            logger.warning(
                "step %d: generation %d %s; training goes on with generation %d",
                step,
                due,
                state,
                self._order.generation,
            )
            self._on_event(
                {
                    "step": step,
                    "event": "wait_ended",
                    "generation": due,
                    "reason": state,
                    "seconds": round(time.monotonic() - started, 3),
                }
            )
        return number

    def _poll(self, due: int | None, started: float, mode: str) -> tuple[int | None, str]:
        """Rank 0: look until something is decided or a slice of waiting is over."""
        slice_end = time.monotonic() + _WAIT_SLICE_SECONDS
        while True:
            number = self._newest()
            if due is None or (number is not None and number >= due):
                return number, "go on"
            if self._failed(due):
                return number, "failed on the server"
            if mode == "inline":
                return number, "was not made"
            if time.monotonic() - started > self._config.selection.wait_timeout_seconds:
                return number, f"did not come within {self._config.selection.wait_timeout_seconds:g} s"
            if time.monotonic() > slice_end:
                return number, "wait"
            time.sleep(0.2)

    def _adopt(self, number: int, step: int, issued_samples: int) -> None:
        """Load and check on every rank, commit on rank 0, then use."""
        started = time.monotonic()
        generation, problem = None, None
        try:
            generation = load_generation(self._paths.selection, number, self._pool)
            if generation.num_samples == 0:
                problem = f"generation {number} selects nothing"
        except (UserError, OSError) as error:
            problem = str(error)
        reports: list[Any] = [None] * self._groups.world_size
        dist.all_gather_object(reports, (problem, issued_samples, generation.digest if generation else None))
        problems = [text for text, _, _ in reports if text is not None]
        if problems or generation is None:
            self._refused.add(number)
            logger.warning("generation %d is refused, training goes on with %d: %s", number, self._order.generation, problems[0])
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
        extended = self._order.current.extended(entry, generation.mask)
        if self._groups.is_main:
            append_entry(self._paths.generation_log, entry)
        self._groups.barrier()
        self._order.adopt(extended, generation.mask)
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
                "seconds": round(time.monotonic() - started, 3),
            }
        )
