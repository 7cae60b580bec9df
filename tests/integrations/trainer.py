"""A trainer with Megatron-DeepSpeed's arguments, sampler and order of events, and no model: it keeps what it is given."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader

from megatron_groupmates.integrations import session
from megatron_groupmates.integrations.forks import MEGATRON_DEEPSPEED, Fork
from megatron_groupmates.pool.generation import publish, write_generation
from megatron_groupmates.pool.index import PoolIndex

LENGTH, BATCH, MICRO_BATCH, STEPS = 9, 4, 1, 12


def fork_arguments(directory: Path, **changes: Any) -> argparse.Namespace:
    """What the checkout's arguments are when it asks for its data; Group-MATES is on, in ``directory``."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "seq_length": LENGTH - 1,
        "max_position_embeddings": LENGTH - 1,
        "padded_vocab_size": 320,
        "train_iters": STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": MICRO_BATCH,
        "data_parallel_size": 1,
        "lr": 1e-3,
        "seed": 7,
        "num_workers": 0,
        "log_interval": 1,
        "save": str(directory / "save"),
        "load": str(directory / "save"),
        "save_interval": 2,
        "dataloader_type": "single",
        "no_pipeline_parallel": True,
        "deepspeed_config_dict": {"zero_optimization": {"stage": 1}},
        "iteration": 0,
        "consumed_train_samples": 0,
        "group_mates_selection": str(directory / "selection"),
        "group_mates_pool": str(directory / "pool"),
        "group_mates_config": None,
        "group_mates_evaluation": None,
        "group_mates_poll_interval": None,
    }
    return argparse.Namespace(**(values | changes))


def fork_with(saved: dict[str, Any] | None = None, end_of_document: int = 0) -> Fork:
    """Megatron-DeepSpeed, whose checkpoint says ``saved`` and whose tokenizer has this end-of-document token."""
    return dataclasses.replace(MEGATRON_DEEPSPEED, saved_state=lambda args: saved, end_of_document=lambda: end_of_document)


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """A process group of this process alone, and a session of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        session.close()
        dist.destroy_process_group()


@dataclasses.dataclass
class Sampler:
    """The batches of Megatron's pretraining sampler."""

    args: argparse.Namespace
    total: int
    data_rank: int
    consumed: int

    def __iter__(self) -> Iterator[list[int]]:
        micro, size = self.args.micro_batch_size, self.args.micro_batch_size * self.args.data_parallel_size
        for first in range(self.consumed, self.total - size + 1, size):
            yield list(range(first + self.data_rank * micro, first + (self.data_rank + 1) * micro))


def train(
    args: argparse.Namespace,
    fork: Fork,
    stop: int,
    data_rank: int | None = 0,
    before_step: Callable[[int], None] = lambda step: None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Steps up to ``stop`` as the checkout makes them.

    Args:
        args: the checkout's; ``iteration`` and ``consumed_train_samples`` are those of its checkpoint.
        fork: what the session is told.
        stop: step to end at.
        data_rank: of this rank; None where it has no data loader, as tensor-parallel ranks but the first.
        before_step: called before each step boundary.

    Returns:
        Tokens of this rank's samples int64[n, LENGTH] in the order of training, and ``args.group_mates`` of the last step's
        checkpoint.
    """
    batches = None
    if data_rank is not None:
        train_data, _, _ = session.datasets(args, [args.train_iters * args.global_batch_size, 0, 0], fork)
        sampler = Sampler(args, len(train_data), data_rank, args.consumed_train_samples)
        batches = iter(DataLoader(train_data, batch_sampler=sampler, num_workers=args.num_workers))
    seen = []
    while args.iteration < stop:
        before_step(args.iteration)
        session.step_boundary(args, fork)
        for _ in range(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)):
            if batches is not None:
                seen.append(next(batches)["text"].numpy())
        args.iteration += 1
        args.consumed_train_samples += args.global_batch_size
    return np.concatenate(seen) if seen else np.empty((0, LENGTH), np.int64), copy.deepcopy(args.group_mates)


def publish_rows(selection: Path, pool: PoolIndex, number: int, count: int = 20) -> None:
    """Publish a generation of some rows, as a server would."""
    rows = np.random.default_rng(number).permutation(pool.num_samples)[:count]
    write_generation(selection, number, pool, rows, {"method": "test"})
    publish(selection, number)
