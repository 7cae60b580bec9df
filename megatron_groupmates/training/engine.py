"""The DeepSpeed engine: built, saved and loaded in DeepSpeed's own checkpoint layout."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch

from megatron_groupmates.config import Config, UserError, config_to_dict
from megatron_groupmates.parallel import ParallelGroups, resolve_precision
from megatron_groupmates.parallel.device import skip_inference_operators
from megatron_groupmates.training.optimizer import build_optimizer


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
    client_state = {**dataclasses.asdict(progress), "config": config_to_dict(config), "gated_linear_unit": True}
    try:
        engine.save_checkpoint(str(directory), tag=checkpoint_tag(progress.step), client_state=client_state)
    except RuntimeError as error:
        # torch reports a full disk as a failure of its zip writer, without saying why.
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / checkpoint_tag(progress.step))) from error


def load(engine: deepspeed.DeepSpeedEngine, directory: Path, tag: str | None) -> Progress:
    """Restore weights, optimizer state and progress from ``directory``. Collective: every rank must call.

    Raises:
        UserError: when there is no checkpoint of this trainer there.
    """
    if not (directory / "latest").is_file() and tag is None:
        raise UserError(f"checkpoint directory {directory} has no file 'latest': it holds no complete checkpoint")
    if tag is not None and not (directory / tag).is_dir():
        found = ", ".join(sorted(p.name for p in directory.glob("global_step*"))) or "none"
        raise UserError(f"checkpoint {directory / tag} does not exist; found: {found}")
    path, client_state = engine.load_checkpoint(str(directory), tag=tag)
    if path is None or "consumed_train_samples" not in client_state:
        raise UserError(
            f"{directory} does not hold a checkpoint of this trainer; point checkpoint.load at a directory with a file 'latest'"
        )
    return Progress(**{field.name: client_state[field.name] for field in dataclasses.fields(Progress) if field.name in client_state})
