"""The DeepSpeed engine: built, saved and loaded in DeepSpeed's own checkpoint layout."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from megatron_groupmates.checkpoint.discovery import latest_tag
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, UserError, config_to_dict, has_gated_mlp
from megatron_groupmates.parallel import ParallelGroups, resolve_precision
from megatron_groupmates.parallel.device import skip_inference_operators
from megatron_groupmates.training.optimizer import build_optimizer
from megatron_groupmates.training.resharding import Layout, check_same_model, load_resharded

logger = logging.getLogger(__name__)


def checkpoint_tag(step: int) -> str:
    """DeepSpeed's usual name for the checkpoint of a step."""
    return f"global_step{step}"


def build_engine(config: Config, model: torch.nn.Module, groups: ParallelGroups) -> deepspeed.DeepSpeedEngine:
    """Wrap ``model`` for ZeRO training. Collective: every rank must call."""
    training = config.training
    settings: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": config.optimizer.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if resolve_precision(training.precision) == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    skip_inference_operators()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(config, model), mpu=groups, config=settings, dist_init_required=False
    )
    return engine


@dataclasses.dataclass(frozen=True)
class Progress:
    """What besides weights and optimizer state a checkpoint must carry for an exact resume (C2).

    ``packing`` says what a sample is: ``none``, or ``documents/<tokens>``; ``skips_digest`` what was left out of the consumed
    samples, empty for nothing. Older checkpoints lack both.
    """

    step: int
    consumed_train_samples: int
    log_digest: str
    pool_fingerprint: str
    packing: str = "none"
    skips_digest: str = ""


def save(engine: deepspeed.DeepSpeedEngine, config: Config, directory: Path, progress: Progress) -> None:
    """Write the checkpoint of ``progress.step``; DeepSpeed replaces ``latest`` last. Collective: every rank must call.

    Raises:
        OSError: ENOSPC when the disk is full; ``latest`` still names the checkpoint before.
    """
    _remove_stale_files(engine.mpu, directory / checkpoint_tag(progress.step))
    client_state = {**dataclasses.asdict(progress), "config": config_to_dict(config), "gated_linear_unit": has_gated_mlp(config)}
    try:
        engine.save_checkpoint(str(directory), tag=checkpoint_tag(progress.step), client_state=client_state)
    except RuntimeError as error:
        # torch reports a full disk as a failure of its zip writer, without saying why.
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / checkpoint_tag(progress.step))) from error


def load(engine: deepspeed.DeepSpeedEngine, directory: Path, tag: str | None) -> Progress:
    """Restore weights, optimizer state and progress from ``directory``, whatever layout they were saved with.

    Collective: every rank must call.

    Raises:
        UserError: when there is no checkpoint of this trainer there, or one of another model.
    """
    tag = tag or latest_tag(directory)
    if tag is None:
        raise UserError(f"checkpoint directory {directory} has no file 'latest': it holds no complete checkpoint")
    if not (directory / tag).is_dir():
        found = ", ".join(sorted(p.name for p in directory.glob("global_step*"))) or "none"
        raise UserError(f"checkpoint {directory / tag} does not exist; found: {found}")
    groups: ParallelGroups = engine.mpu
    saved, progress = _inspect(engine, groups, directory / tag)
    layout = Layout.of_engine(engine, groups)
    if saved == layout:
        with _keeping_settings(engine):
            engine.load_checkpoint(str(directory), tag=tag)
    else:
        logger.info("checkpoint %s is resharded from %s to %s", directory / tag, saved, layout)
        load_resharded(engine, ZeroCheckpoint(directory / tag), groups)
    return progress


@contextlib.contextmanager
def _keeping_settings(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """DeepSpeed loads the optimizer's settings with its state; a run that branches has settings of its own."""
    optimizer = engine.optimizer
    names = ("weight_decay", "betas", "eps")
    kept = [{name: group[name] for name in names} for group in optimizer.param_groups]
    clipping = getattr(optimizer, "clip_grad", None)
    yield
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    if clipping is not None:
        optimizer.clip_grad = clipping


def _remove_stale_files(groups: ParallelGroups, tag_dir: Path) -> None:
    """Files of an earlier save of the same step, cut short or rolled back from, may be of ranks that this run has not.

    Collective: every rank must call.
    """
    if groups.is_main:
        for path in tag_dir.glob("*_states.pt"):
            path.unlink()
    groups.barrier()


def _inspect(engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups, tag_dir: Path) -> tuple[Layout, Progress]:
    """What the main rank finds of a checkpoint, on every rank; errors as of :func:`load`. Collective: every rank must call."""
    found: tuple[Layout, Progress] | UserError | None = None
    if groups.is_main:
        try:
            checkpoint = ZeroCheckpoint(tag_dir)
            state = checkpoint.client_state
            if "consumed_train_samples" not in state:
                raise UserError(
                    f"{tag_dir} does not hold a checkpoint of this trainer; point checkpoint.load at a directory with a file 'latest'"
                )
            check_same_model(checkpoint, engine, groups)
            names = (field.name for field in dataclasses.fields(Progress))
            found = Layout.of_checkpoint(checkpoint), Progress(**{name: state[name] for name in names if name in state})
        except UserError as error:
            found = error
    found = groups.broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    assert found is not None
    return found
