"""Waiting for checkpoints and running a round for each planned refresh."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import numpy as np

from megatron_groupmates.checkpoint.discovery import check_complete, latest_tag, tag_of, tag_step
from megatron_groupmates.checkpoint.opening import open_checkpoint
from megatron_groupmates.config import Config, RunPaths, UserError, config_to_dict, refresh_number, refresh_steps
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.contexts import choose_packing
from megatron_groupmates.pool.exclusion import Exclusion, open_exclusion
from megatron_groupmates.pool.generation import load_generation, read_pointer, read_provenance
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, read_log
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.server.context import RoundContext, RoundInput, record_server_state
from megatron_groupmates.server.round import run_round
from megatron_groupmates.server.tracking import round_values
from megatron_groupmates.training.data import check_same_tokenizer, open_pool
from megatron_groupmates.training.metrics import read_training_state
from megatron_groupmates.utils.files import write_json
from megatron_groupmates.utils.run_directory import find_checkpoint, generation_log_source
from megatron_groupmates.utils.tracking import Tracker, open_tracker

logger = logging.getLogger(__name__)

_POLL_SLICE_SECONDS = 10.0  # below any collective's timeout, so that ranks waiting for rank 0 never look hung
_FINISHED, _IDLE = "finished", "idle"


def serve(config: Config, groups: ParallelGroups, once: bool) -> bool:
    """Run rounds until the run is over, or one round. Collective: every rank must call.

    A round that fails leaves the old generation live and is recorded; the server goes on with the next.

    Returns:
        False when the last round failed.

    Raises:
        UserError: bad pool or reference set; with ``once`` also when there is no checkpoint.
    """
    paths = RunPaths.of(config)
    pool = open_pool(config, config.data.pool, "data.pool")
    exclusion = open_exclusion(config, pool)
    reference = pool
    if config.data.reference is not None:
        reference = open_pool(config, config.data.reference, "data.reference")
        check_same_tokenizer(pool, reference, "data.reference")
    succeeded = True
    with contextlib.closing(_open_tracker(config, groups, paths)) as tracker:
        while True:
            # Rank 0's view for all: the trainer may write a checkpoint between two ranks' looks.
            tag_dir = groups.broadcast_object(_newest_tag(config)) if once else _await_refresh(config, paths, groups)
            if tag_dir is None:
                break
            step = tag_step(tag_dir.name)
            number = groups.broadcast_object(_round_number(config, paths, step) if groups.is_main else None)
            if number is None:
                logger.info("the selection for %s is already published; nothing to do", tag_dir.name)
                break
            succeeded = _try_round(config, groups, paths, pool, exclusion, reference, number, tag_dir)
            if succeeded and groups.is_main:
                tracker.log(round_values(number, read_provenance(paths.selection, number)), step)
            if once:
                break
    record_server_state(paths, groups, "finished" if succeeded else "failed")
    return succeeded


def _open_tracker(config: Config, groups: ParallelGroups, paths: RunPaths) -> Tracker:
    """A W&B run of the server's own, beside the trainer's, by the same settings; one that does nothing but on the main rank."""
    mode = config.run.wandb_mode if groups.is_main else "disabled"
    return open_tracker(config.run.wandb_project, f"{config.run.name} selection", mode, paths.root, config_to_dict(config))


def _try_round(
    config: Config,
    groups: ParallelGroups,
    paths: RunPaths,
    pool: PoolIndex,
    exclusion: Exclusion,
    reference: PoolIndex,
    number: int,
    tag_dir: Path,
) -> bool:
    try:
        check_complete(tag_dir)
        checkpoint = open_checkpoint(config, tag_dir)
        given = RoundInput(
            number=number,
            tag_dir=tag_dir,
            step=checkpoint.step,
            consumed_train_samples=checkpoint.consumed_train_samples,
            learning_rate=checkpoint.next_learning_rate,
        )
        context = RoundContext(config, groups, pool, given, exclusion)
        if groups.is_main:
            for line in checkpoint.left_out_of_oracles:
                logger.info("round %d: %s", number, line)
            paths.round_failure(number).unlink(missing_ok=True)
        run_round(context, reference, _consumed_rows(config, pool, exclusion, given.consumed_train_samples))
    except UserError as error:
        # Raised alike on every rank; anything else ends the job and is a matter for a restart.
        logger.error("round %d failed, the old generation stays live: %s", number, error)
        if groups.is_main:
            write_json(paths.round_failure(number), {"checkpoint_tag": tag_dir.name, "reason": str(error)})
        groups.barrier()
        return False
    return True


def _consumed_rows(config: Config, pool: PoolIndex, exclusion: Exclusion, consumed_train_samples: int) -> np.ndarray:
    """bool ``[num_samples]``: what training had consumed at the checkpoint, by the generation log, or may never consume.

    A new epoch forgets the former.
    """
    paths = generation_log_source(config)
    entries = read_log(paths.generation_log) or (LogEntry(generation=0, effective_sample=0, epoch=0, digest=""),)
    # A log may begin at the checkpoint or after it: selection was switched on there, and nothing of the pool is consumed yet.
    consumed_train_samples = max(consumed_train_samples, entries[0].effective_sample)
    entries = entries[:1] + tuple(entry for entry in entries[1:] if entry.effective_sample < consumed_train_samples)
    masks = {0: np.ones(pool.num_samples, dtype=bool)}
    masks |= {number: load_generation(paths.selection, number, pool).mask for number in {entry.generation for entry in entries} - {0}}
    packing = choose_packing(pool, config.data.packing, config.model.sequence_length)
    order = SampleOrder(pool.num_samples, config.run.seed, entries, masks, packing, exclusion.mask)
    consumed = order.consumed(consumed_train_samples)
    if not consumed.all():
        return consumed
    return np.zeros_like(consumed) if exclusion.mask is None else exclusion.mask


def _round_number(config: Config, paths: RunPaths, step: int) -> int | None:
    """Number of the generation to make from the checkpoint of ``step``; None when a published one is from there or later."""
    published = read_pointer(paths.selection) or 0
    if published and _checkpoint_step(paths, published) >= step:
        return None
    return max(refresh_number(config, step) or 0, published + 1)


def _checkpoint_step(paths: RunPaths, number: int) -> int:
    return int(read_provenance(paths.selection, number).get("checkpoint_step", -1))


def _newest_tag(config: Config) -> Path:
    """The newest complete checkpoint of the run, or the one it will branch from."""
    found = find_checkpoint(config)
    if found is None:
        checkpoints = RunPaths.of(config).checkpoints
        raise UserError(f"{checkpoints} holds no complete checkpoint (no file 'latest'); start the trainer first")
    directory, tag = found
    tag = tag or latest_tag(directory)
    if tag is None:
        raise UserError(f"checkpoint.load: {directory} holds no complete checkpoint (no file 'latest')")
    return directory / tag


def _await_refresh(config: Config, paths: RunPaths, groups: ParallelGroups) -> Path | None:
    """Directory of the newest refresh checkpoint that has no generation yet; None when there will be no more. Collective."""
    started, told = time.monotonic(), False
    while True:
        found = groups.broadcast_object(_poll(config, paths, started) if groups.is_main else None)
        if found == _FINISHED:
            logger.info("no further refresh is planned; the server ends")
            return None
        if found == _IDLE:
            logger.info("no new checkpoint for %g s; the server ends", config.server.idle_timeout_seconds)
            return None
        if found is not None:
            return Path(found)
        if not told:
            record_server_state(paths, groups, "waiting")
            logger.info("waiting for the checkpoint of a planned refresh in %s", paths.checkpoints)
            told = True


def _poll(config: Config, paths: RunPaths, started: float) -> str | None:
    """Rank 0: look for a slice of time; a checkpoint's path, ``_FINISHED``, ``_IDLE``, or None to be asked again."""
    slice_end = time.monotonic() + _POLL_SLICE_SECONDS
    while time.monotonic() < slice_end:
        open_steps = [step for step in refresh_steps(config) if _is_open(config, paths, step)]
        complete = _complete_checkpoints(config, paths)
        ready = [step for step in open_steps if step in complete]
        if ready:
            return str(complete[ready[-1]])
        if not open_steps or read_training_state(paths).get("state") == "finished":
            return _FINISHED
        idle = config.server.idle_timeout_seconds
        if idle is not None and time.monotonic() - started > idle:
            return _IDLE
        time.sleep(config.server.poll_interval_seconds)
    return None


def _complete_checkpoints(config: Config, paths: RunPaths) -> dict[int, Path]:
    """Step to directory of each planned refresh's complete checkpoint: the run's own, and the one it branches from."""
    newest = latest_tag(paths.checkpoints)
    last = -1 if newest is None else tag_step(newest)
    planned = [] if newest is None else [step for step in refresh_steps(config) if step <= last]
    own = {step: paths.checkpoints / tag_of(step, newest) for step in planned}
    found = {step: path for step, path in own.items() if path.is_dir()}
    if config.checkpoint.load is not None:
        parent = Path(config.checkpoint.load)
        tag = config.checkpoint.load_tag or latest_tag(parent)
        step = None if tag is None else tag_step(tag)
        if step is not None and (parent / tag).is_dir():
            found.setdefault(step, parent / tag)
    return found


def _is_open(config: Config, paths: RunPaths, step: int) -> bool:
    """Whether the refresh at ``step`` still wants a round: not published from there or later, and not failed for good."""
    number = _round_number(config, paths, step)
    return number is not None and not paths.round_failure(number).exists()
