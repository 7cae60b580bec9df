"""Tiny training runs for tests: a pool, a config, and functions that one rank of a job calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.config import Config, dump_config, parse_config
from megatron_groupmates.parallel import initialize_parallel
from megatron_groupmates.parallel.launch import LaunchEnvironment
from megatron_groupmates.utils.files import read_lines
from tests.pool.helpers import make_pool

SEQUENCE_LENGTH = 16


class Killed(Exception):
    """Stands for a process that dies between two steps."""


def make_config(root: Path, *overrides: str, run: str = "run") -> Config:
    """A config of a tiny run below ``root``, its pools written on first use; YAML text of it lies in ``<run>.yaml``."""
    for name, seed, rows in (("pool", 0, (60, 50, 40)), ("evaluation", 1, (12,)), ("reference", 2, (8,))):
        if not (root / name).exists():
            make_pool(root / name, rows, SEQUENCE_LENGTH + 1, seed)
    text = f"""
run: {{output_dir: {root / run}, wandb_mode: disabled, seed: 7}}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, vocab_size: 304,
        sequence_length: {SEQUENCE_LENGTH}, z_loss: 1.0e-4}}
data: {{pool: {root / "pool"}, evaluation: {root / "evaluation"}, reference: {root / "reference"}, num_workers: 0}}
training: {{train_iters: 12, global_batch_size: 4, micro_batch_size: 2, log_interval: 1, eval_interval: 6}}
optimizer: {{learning_rate: 1.0e-2, warmup_iters: 3}}
checkpoint: {{save_interval: 4}}
"""
    config = parse_config(text, overrides)
    (root / f"{run}.yaml").write_text(dump_config(config))
    return config


def start(rank: int, world_size: int, config: Config) -> Any:
    """The groups of this rank; the harness has started torch.distributed already."""
    environment = LaunchEnvironment(rank, rank, world_size, world_size, "127.0.0.1", 0)
    groups = initialize_parallel(environment, config.parallel.tensor_model_parallel_size, config.run.seed)
    torch.set_num_threads(1)
    return groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One start of the trainer.

    Attributes:
        config: the run.
        die_before_step: raise :class:`Killed` before this step's batch is read.
        publish_before_step: rank 0 publishes generation 1 (every third row of the pool) at this step boundary.
    """

    config: Config
    die_before_step: int | None = None
    publish_before_step: int | None = None


def train_jobs(rank: int, world_size: int, jobs: Sequence[Job]) -> list[str]:
    """Start the trainer for each job, one after the other, as the ``train`` command does; what each start ended with."""
    return [train_in_rank(rank, world_size, job) for job in jobs]


def train_in_rank(rank: int, world_size: int, job: Job) -> str:
    """One start of the trainer in this process: ``killed``, or what the trainer says."""
    config = job.config
    groups = start(rank, world_size, config)
    from megatron_groupmates.training.loop import Trainer

    trainer = Trainer(config, groups)
    train_step = trainer._train_step

    def step(rate: float) -> Any:
        if trainer.step == job.die_before_step:
            raise Killed
        if trainer.step == job.publish_before_step and groups.is_main:
            publish_every_third(config)
        if trainer.adopter is not None and trainer.adopter._preparation is not None:
            # What is found at one boundary is adopted at the next, however fast this machine is.
            assert trainer.adopter._preparation.wait(60)
        return train_step(rate)

    trainer._train_step = step
    try:
        return trainer.run()
    except Killed:
        return "killed"
    finally:
        trainer.close()


def publish_every_third(config: Config, number: int = 1) -> None:
    """Publish a generation of every third row, as a selection server would."""
    import numpy as np

    from megatron_groupmates.pool.generation import publish, write_generation
    from megatron_groupmates.pool.index import PoolIndex

    pool, selection = PoolIndex.open(config.data.pool), Path(config.run.output_dir) / "selection"
    write_generation(selection, number, pool, np.arange(0, pool.num_samples, 3), {"method": "test", "checkpoint_step": 0})
    publish(selection, number)


def losses(config: Config) -> list[float]:
    """Training losses by step, in full precision."""
    return [row["loss"] for row in rows(config) if "loss" in row]


def evaluations(config: Config) -> list[tuple[int, float]]:
    """(step, evaluation loss)."""
    return [(row["step"], row["evaluation_loss"]) for row in rows(config) if "evaluation_loss" in row]


def rows(config: Config) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    return read_lines(Path(config.run.output_dir) / "metrics.jsonl")
