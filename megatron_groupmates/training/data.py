"""Batches in the order of the generation log, and the held-out batches of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.dataset import OrderBatchSampler, PoolDataset
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.training.live_order import LiveOrder


def open_pool(config: Config, path: str, what: str) -> PoolIndex:
    """Open the pool at ``path`` and check that its tokens fit the model.

    Args:
        config: the run.
        path: pool directory.
        what: the setting it came from, for messages.

    Raises:
        UserError: no pool there, or a vocabulary larger than the model's.
    """
    try:
        pool = PoolIndex.open(path)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    if pool.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{what}: the tokenizer of {path} has {pool.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}; "
            f"raise model.vocab_size to at least {pool.vocab_size}"
        )
    return pool


def check_same_tokenizer(pool: PoolIndex, other: PoolIndex, what: str) -> None:
    """Refuse a held-out pool whose token ids mean something else.

    Raises:
        UserError: naming both tokenizers.
    """
    if pool.tokenizer["fingerprint"] != other.tokenizer["fingerprint"]:
        raise UserError(
            f"{what}: {other.directory} was tokenised with {other.tokenizer}, the pool {pool.directory} with {pool.tokenizer}; "
            "preprocess both with the same tokenizer"
        )


class TrainingData:
    """Micro-batches of this data-parallel rank, in the order in force.

    Attributes:
        sampler: what decides which samples come next; ``issued_samples`` is how far it has read ahead.
    """

    def __init__(self, config: Config, pool: PoolIndex, order: LiveOrder, groups: ParallelGroups, consumed_train_samples: int) -> None:
        training, data = config.training, config.data
        self.sampler = OrderBatchSampler(
            lambda: order.current,
            consumed_train_samples,
            training.micro_batch_size,
            groups.data_rank,
            groups.data_size,
            training.global_batch_size,
        )
        self._order = order
        self._samples_per_micro_step = training.micro_batch_size * groups.data_size
        self._read_ahead = data.num_workers * data.prefetch_factor * self._samples_per_micro_step
        self._global_batch_size = training.global_batch_size
        self._micro_steps = training.global_batch_size // self._samples_per_micro_step
        self._device = groups.device
        workers = {"prefetch_factor": data.prefetch_factor, "persistent_workers": True} if data.num_workers else {}
        self._loader = DataLoader(
            PoolDataset(pool, config.model.sequence_length),
            batch_sampler=self.sampler,
            num_workers=data.num_workers,
            pin_memory=groups.device.type == "cuda",
            **workers,
        )
        self._batches: Iterator[torch.Tensor] | None = None

    def step_batches(self) -> Iterator[torch.Tensor]:
        """The micro-batches of one optimizer step, int64 ``[micro_batch_size, sequence_length + 1]`` on the device.

        Every rank must call once per step: it also commits the epoch entries that reading ahead will need.
        """
        self._order.ensure(self.sampler.issued_samples + self._read_ahead + self._global_batch_size)
        if self._batches is None:
            self._batches = iter(self._loader)
        for _ in range(self._micro_steps):
            yield next(self._batches).to(self._device, non_blocking=True)


class HeldOutData:
    """The first ``num_samples`` rows of a held-out pool, split over data-parallel ranks in batches."""

    def __init__(self, pool: PoolIndex, sequence_length: int, num_samples: int | None, batch_size: int, groups: ParallelGroups) -> None:
        self._dataset = PoolDataset(pool, sequence_length)
        self._rows = range(min(num_samples or pool.num_samples, pool.num_samples))[groups.data_rank :: groups.data_size]
        self._batch_size = batch_size
        self._device = groups.device

    def __iter__(self) -> Iterator[torch.Tensor]:
        for first in range(0, len(self._rows), self._batch_size):
            rows = self._rows[first : first + self._batch_size]
            yield torch.stack([self._dataset[row] for row in rows]).to(self._device)
