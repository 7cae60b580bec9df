"""Runs of one training at several parallel layouts: bodies of ranks, and what they leave to compare."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.config import Config
from tests.common.gpt_runs import open_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop:
    """A checkpoint loaded into an engine of ``config`` and saved again by it, without a step in between."""

    config: Config
    source: Path
    target: Path


def train_layouts(rank: int, world_size: int, configs: Sequence[Config], last_step: int | None = None) -> list[list[list[str]]]:
    """Body of one rank: train each config to its end, or until before ``last_step`` as if killed then.

    Returns:
        For each config, step by step, digests of the samples of this rank in the order it read them.
    """
    return [_train(rank, config, last_step) for config in configs]


def _train(rank: int, config: Config, last_step: int | None) -> list[list[str]]:
    from megatron_groupmates.training.loop import Trainer
    from megatron_groupmates.utils.run_directory import check_run_directory, write_run_config

    groups = open_groups(config.parallel.tensor_model_parallel_size)
    check_run_directory(config)
    groups.barrier()
    if rank == 0:
        write_run_config(config)
    seen: list[list[str]] = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with matrices_partitioned():
            trainer = Trainer(config, groups)
        step_batches, train_step = trainer.data.step_batches, trainer._train_step

        def noted() -> Any:
            for samples, unscored in step_batches():
                seen[-1] += [hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16] for sample in samples]
                yield samples, unscored

        def step(rate: float) -> torch.Tensor:
            if trainer.step == last_step:
                raise KeyboardInterrupt
            seen.append([])
            return train_step(rate)

        trainer.data.step_batches, trainer._train_step = noted, step
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run()
        trainer.close()
    return seen


def in_global_order(seen: Sequence[list[list[str]]], config: Config) -> list[list[str]]:
    """Digests step by step in the order of global sample numbers, from what each rank saw.

    Each rank of a tensor-parallel group must have seen the same.
    """
    tensor, micro = config.parallel.tensor_model_parallel_size, config.training.micro_batch_size
    for rank, steps in enumerate(seen):
        assert steps == seen[rank - rank % tensor]
    by_data_rank = seen[::tensor]
    return [
        [digest for first in range(0, len(steps[0]), micro) for own in steps for digest in own[first : first + micro]]
        for steps in zip(*by_data_rank, strict=True)
    ]


def hop(rank: int, world_size: int, hops: Sequence[Hop]) -> list[dict[str, Any]]:
    """Body of one rank: make each hop, checking that the model's own weights are the rounded float32 ones.

    Returns:
        For each, what DeepSpeed counts, ``global_steps`` and ``global_samples``, and what was logged of the checkpoint.
    """
    return [_hop(one) for one in hops]


def _hop(one: Hop) -> dict[str, Any]:
    from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
    from megatron_groupmates.model.gpt import build_gpt
    from megatron_groupmates.parallel import resolve_precision
    from megatron_groupmates.training import engine as checkpoints

    config = one.config
    groups = open_groups(config.parallel.tensor_model_parallel_size)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # Other initial weights than those of the run: nothing may be left of them.
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=99))
        model = build_gpt(config, groups, groups.tensor_size, resolve_precision(config.training.precision), for_training=True)
        with matrices_partitioned():
            engine = checkpoints.build_engine(config, model, groups)
        with noted_messages("megatron_groupmates.training.engine") as messages:
            progress = checkpoints.load(engine, one.source.parent, one.source.name)
        saved = ZeroCheckpoint(one.source)
        for name, parameter in engine.module.named_parameters():
            expected = saved.read_slice(name, "param", groups.tensor_rank, groups.tensor_size).to(parameter.dtype)
            with gathered(parameter):
                assert torch.equal(parameter.detach(), expected), name
        checkpoints.save(engine, config, one.target.parent, progress)
        counted = {"global_steps": engine.global_steps, "global_samples": engine.global_samples, "messages": messages}
        engine.destroy()
    return counted


def gathered(parameter: torch.nn.Parameter) -> Any:
    """The whole parameter in place of the part that ZeRO-3 leaves on a rank. Collective over the data-parallel group."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


@contextlib.contextmanager
def matrices_partitioned() -> Iterator[None]:
    """ZeRO-3 keeps norms alone whole on every rank, as in a model of ordinary size; by default all parameters of a tiny one."""
    import deepspeed

    initialize = deepspeed.initialize

    def with_threshold(*, config: dict[str, Any], **options: Any) -> Any:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        return initialize(config=config, **options)

    deepspeed.initialize = with_threshold
    yield
    deepspeed.initialize = initialize


@contextlib.contextmanager
def noted_messages(name: str) -> Iterator[list[str]]:
    """What the logger of this name says meanwhile."""
    messages: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)
