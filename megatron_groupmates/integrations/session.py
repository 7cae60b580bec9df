"""Group-MATES in a trainer of the user's own: its datasets, and what happens at its step boundaries.

The trainer calls :func:`datasets` where it builds its data and :func:`step_boundary` before every optimizer step, both
with its own arguments. Everything else follows: the run's config and log, adoption, and what its checkpoints say.
"""

from __future__ import annotations

import argparse
import atexit
import datetime
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_groupmates.config import Config, RunPaths, UserError, dump_config, parse_config
from megatron_groupmates.integrations.arguments import GroupMatesArguments
from megatron_groupmates.integrations.forks import MEGATRON_DEEPSPEED, Fork
from megatron_groupmates.integrations.resume import check_resume, saved_state
from megatron_groupmates.integrations.settings import check_end_of_document, check_first_refresh, resolve_config
from megatron_groupmates.parallel import Job
from megatron_groupmates.pool.contexts import choose_packing
from megatron_groupmates.pool.exclusion import open_exclusion
from megatron_groupmates.pool.global_dataset import GlobalSampleDataset, HeldOutDataset
from megatron_groupmates.pool.log import LogEntry, append_entry, log_digest, read_log
from megatron_groupmates.pool.shared_log import SharedLog
from megatron_groupmates.training.adoption import GenerationAdopter, read_generation_log, start_generation_log
from megatron_groupmates.training.data import check_same_tokenizer, open_pool
from megatron_groupmates.training.live_order import LiveOrder
from megatron_groupmates.training.metrics import MetricsFile, read_training_state, write_training_state
from megatron_groupmates.utils.logging import show_package_messages
from megatron_groupmates.utils.run_directory import check_run_directory, write_run_config

logger = logging.getLogger(__name__)

_PREFETCH_FACTOR = 2  # torch's: micro-batches that a data loader asks each of its processes for ahead of training
_READY = "megatron_groupmates/ready"
_READY_TIMEOUT = datetime.timedelta(minutes=30)

_open: Session | None = None


def datasets(
    args: argparse.Namespace, train_val_test_num_samples: Sequence[int], fork: Fork = MEGATRON_DEEPSPEED
) -> tuple[GlobalSampleDataset | None, HeldOutDataset | None, None]:
    """Training, validation and test datasets for the trainer's own samplers; those that do not exist are None.

    Not collective, but rank 0 must be among the ranks that call: the others wait until it has opened the run. To be called
    once the trainer has loaded its checkpoint, and before its data loader starts processes.

    Args:
        args: the trainer's, with ``iteration`` and ``consumed_train_samples``.
        train_val_test_num_samples: samples that training, validation and test will ask for.
        fork: which trainer it is.

    Raises:
        UserError: an argument, the pool, the selection directory or the checkpoint does not fit.
    """
    return _session(args, fork).datasets(train_val_test_num_samples)


def step_boundary(args: argparse.Namespace, fork: Fork = MEGATRON_DEEPSPEED) -> None:
    """Adopt what there is to adopt, and let the samples of the coming step be read.

    Collective: every rank must call before each optimizer step, with ``iteration`` and ``consumed_train_samples`` as they
    are between the steps.

    Raises:
        UserError: as :func:`datasets`, or the ranks read different logs.
    """
    _session(args, fork).step_boundary(args)


def close(failed: bool = False) -> None:
    """Forget the session, at the end of the process or of a test; records that training is over where it is.

    Args:
        failed: an error ends the process, perhaps in what comes after the last step: nothing is recorded.
    """
    global _open
    if _open is not None:
        session, _open = _open, None
        atexit.unregister(_close_at_exit)
        if not failed:
            session.close()


def _close_at_exit() -> None:
    # Set by the interpreter before it prints the exception that ends it.
    close(failed=getattr(sys, "last_value", None) is not None)


def _session(args: argparse.Namespace, fork: Fork) -> Session:
    global _open
    if _open is None:
        arguments = GroupMatesArguments.of(args)
        assert arguments is not None, "called without --group-mates-selection"
        _open = Session(args, arguments, fork)
        atexit.register(_close_at_exit)
    return _open


class Session:
    """What one rank of the trainer holds. Opened on rank 0 first: it writes what the others then read."""

    def __init__(self, args: argparse.Namespace, arguments: GroupMatesArguments, fork: Fork) -> None:
        self._job = Job.running()
        self._args, self._fork = args, fork
        self._stepping = False
        show_package_messages("group-mates", self._job.rank)
        store = dist.distributed_c10d._get_default_store()
        if self._job.is_main:
            try:
                config = resolve_config(args, arguments, fork)
                check_run_directory(config)
                self._open_run(config)
            except Exception as error:
                store.set(_READY, json.dumps({"error": f"{type(error).__name__}: {error}"}))
                raise
            store.set(_READY, json.dumps({"config": dump_config(config)}))
        else:
            self._open_run(_config_of_rank_0(store))
        self._shared = SharedLog(self._order.current.entries, self._settled)
        self._metrics = MetricsFile(self._paths.metrics, args.iteration, self._job.is_main, lambda row, step: None)
        self._adopter = GenerationAdopter(self._config, self._pool, self._order, self._job, self._write_event)
        self._earlier_seconds = read_training_state(self._paths).get("seconds", 0.0)
        self._started = time.monotonic()

    def _open_run(self, config: Config) -> None:
        """Pool, log and order of the run; rank 0 begins what is new."""
        self._config = config
        self._paths = RunPaths.of(self._config)
        self._pool = open_pool(self._config, self._config.data.pool, "--group-mates-pool")
        check_end_of_document(self._config, self._pool, self._fork)
        self._exclusion = open_exclusion(self._config, self._pool)
        self._packing = choose_packing(self._pool, self._config.data.packing, self._config.model.sequence_length)
        logger.info("training data come from %s (%d samples), as %s says", self._pool.directory, self._pool.num_samples, self._paths.root)
        if self._job.is_main:
            self._begin()
        self._order = self._read_order()
        # A step may come before the first boundary.
        self._settled = 0
        self._settle_next_step()

    def datasets(self, num_samples: Sequence[int]) -> tuple[GlobalSampleDataset | None, HeldOutDataset | None, None]:
        """What :func:`datasets` gives."""
        config, train, valid = self._config, None, None
        if num_samples[0]:
            batch = config.training.global_batch_size
            order, item = self._order.current, self._fork.item
            # The trainer's sampler refuses to start at the end of its data, where a finished run is started again.
            length = max(num_samples[0], self._args.consumed_train_samples + batch)
            train = GlobalSampleDataset(self._pool, self._paths.selection, order, self._shared, length, batch, item)
        if num_samples[1] and config.data.evaluation is not None:
            pool = open_pool(config, config.data.evaluation, "--group-mates-evaluation")
            check_same_tokenizer(self._pool, pool, "--group-mates-evaluation")
            length = getattr(self._args, "consumed_valid_samples", 0) + num_samples[1]
            valid = HeldOutDataset(pool, config.model.sequence_length, length, self._fork.item)
        elif num_samples[1] and self._job.is_main:
            logger.warning("there is no validation: --eval-iters asks for it, but --group-mates-evaluation names no held-out pool")
        return train, valid, None

    def step_boundary(self, args: argparse.Namespace) -> None:
        """What :func:`step_boundary` does."""
        first, self._stepping = not self._stepping, True
        if first:
            self._check_same_log()
        self._adopter.at_step_boundary(max(0, args.iteration - self._fork.boundary_before_save), self._settled)
        self._settle_next_step()
        self._shared.publish(self._order.current.entries, self._settled)
        args.group_mates = self._state(self._order.current.entries)
        # At the first one too: a run that is trained on after its end is no longer finished.
        if first or args.iteration % (getattr(args, "log_interval", None) or 1) == 0:
            self._record("running")

    def close(self) -> None:
        """Record the end of training where this is it."""
        args = self._args
        tokens = getattr(args, "train_tokens", None)  # Megatron-DeepSpeed ends at whichever comes first
        if args.iteration >= self._config.training.train_iters or (tokens and args.consumed_train_tokens >= tokens):
            self._record("finished")

    def _begin(self) -> None:
        """Rank 0: check that the directory belongs to what the trainer goes on from, and begin the log where it is new."""
        args, entries = self._args, read_log(self._paths.generation_log)
        consumed = args.consumed_train_samples
        saved = self._fork.saved_state(args) if consumed else None
        check_resume(saved, self._state(entries), consumed, str(self._paths.selection))
        if not entries:
            check_first_refresh(self._config, args.iteration)
        write_run_config(self._config)
        start_generation_log(self._config, self._pool, self._exclusion, consumed, first_sample=consumed)
        if not entries and consumed:
            logger.info("Group-MATES is switched on at sample %d: the samples before it did not come from the pool", consumed)

    def _read_order(self) -> LiveOrder:
        if not read_log(self._paths.generation_log):
            raise UserError(
                f"{self._paths.generation_log}: rank {self._job.rank} finds no log there, where rank 0 has begun one; "
                "--group-mates-selection must be on a file system that all hosts share"
            )
        entries, masks = read_generation_log(self._config, self._pool, self._exclusion, self._args.consumed_train_samples)
        seed, excluded = self._config.run.seed, self._exclusion.mask
        return LiveOrder(self._pool.num_samples, seed, entries, masks, self._commit_epoch, excluded, self._packing)

    def _commit_epoch(self, entry: LogEntry) -> None:
        if self._job.is_main:
            append_entry(self._paths.generation_log, entry)
        if self._stepping:
            self._job.barrier()
        logger.info("the samples on offer run out at sample %d: epoch %d begins there", entry.effective_sample, entry.epoch)

    def _check_same_log(self) -> None:
        own = log_digest(self._order.current.entries)
        main = self._job.broadcast_object(own)
        if own != main:
            raise UserError(
                f"{self._paths.generation_log}: rank {self._job.rank} reads a log with digest {own[:16]}, rank 0 one with {main[:16]}; "
                "--group-mates-selection must be on a file system that all hosts share"
            )

    def _state(self, entries: Sequence[LogEntry]) -> dict[str, Any]:
        return saved_state(self._config, self._pool, self._exclusion, self._packing.name, entries)

    def _settle_next_step(self) -> None:
        """Fix what the coming step may read: its global batch, and what the loader reads ahead of that."""
        batch = self._config.training.global_batch_size
        stop = self._args.consumed_train_samples + batch + read_ahead_samples(self._args)
        self._settled = -(-stop // batch) * batch
        self._order.ensure(self._settled)

    def _write_event(self, row: dict[str, Any]) -> None:
        self._metrics.write(row | {"step": self._args.iteration})

    def _record(self, state: str) -> None:
        if not self._job.is_main:
            return
        consumed, seconds = self._args.consumed_train_samples, self._earlier_seconds + time.monotonic() - self._started
        write_training_state(
            self._paths,
            state,
            step=self._args.iteration,
            consumed_train_samples=consumed,
            consumed_tokens=consumed * self._config.model.sequence_length,
            seconds=round(seconds, 2),
        )


def _config_of_rank_0(store: dist.Store) -> Config:
    """The run's config once rank 0 has opened it; not from its file, which another host may see later."""
    store.wait([_READY], _READY_TIMEOUT)
    said = json.loads(store.get(_READY))
    if "error" in said:
        raise UserError(f"rank 0 has ended: {said['error']}")
    return parse_config(said["config"], source="the config of rank 0")


def read_ahead_samples(args: argparse.Namespace) -> int:
    """Global samples that the trainer's data loaders have asked for, and training has not used, at a step boundary.

    Every process of a loader is asked for two micro-batches before the first is used, and for another one each time one
    is used; without processes nothing is read ahead.
    """
    return _PREFETCH_FACTOR * args.num_workers * args.micro_batch_size * args.data_parallel_size
