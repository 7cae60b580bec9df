"""Batches in the order of the generation log."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.dataset import ContextDataset, OrderBatchSampler, ReadContexts, as_they_are
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.remote import RemoteSettings
from megatron_groupmates.training.live_order import LiveOrder


def open_pool(config: Config, path: str, what: str) -> PoolIndex:
    """Open the pool at ``path`` and check that its tokens fit the model.

    Args:
        config: the run.
        path: pool directory or URL.
        what: the setting it came from, for messages.

    Raises:
        UserError: no pool there, or a vocabulary larger than the model's.
    """
    try:
        pool = PoolIndex.open(path, remote=RemoteSettings.of(config))
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

    Args:
        config: the run.
        pool: the run's pool.
        order: the order in force; must know how rows become samples.
        groups: this rank's groups.
        consumed_train_samples: first global sample.
        settle: decides about samples that could not be read, see :class:`~megatron_groupmates.training.skipping.DamageGuard`.

    Attributes:
        sampler: what decides which samples come next; ``issued_samples`` is how far it has read ahead.
    """

    def __init__(
        self,
        config: Config,
        pool: PoolIndex,
        order: LiveOrder,
        groups: ParallelGroups,
        consumed_train_samples: int,
        settle: Callable[[ReadContexts], torch.Tensor | None],
    ) -> None:
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
        # Whole global batches: the sampler looks them up together.
        batches_ahead = -(-data.num_workers * data.prefetch_factor * self._samples_per_micro_step // training.global_batch_size)
        self._read_ahead = batches_ahead * training.global_batch_size
        self._global_batch_size = training.global_batch_size
        self._micro_steps = training.global_batch_size // self._samples_per_micro_step
        self._device = groups.device
        workers = {"prefetch_factor": data.prefetch_factor, "persistent_workers": True} if data.num_workers else {}
        self._loader = DataLoader(
            ContextDataset(pool),
            batch_sampler=self.sampler,
            collate_fn=as_they_are,
            num_workers=data.num_workers,
            pin_memory=groups.device.type == "cuda",
            **workers,
        )
        self._settle = settle
        self._batches: Iterator[ReadContexts] | None = None

    def step_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The micro-batches of one optimizer step on the device.

        Every rank must call once per step: it also commits the epoch entries that reading ahead will need.

        Yields:
            Samples int64 ``[micro_batch_size, sequence_length + 1]``, and bool of the same shape, True for tokens that
            must carry no loss, or None.
        """
        self._order.ensure(self.sampler.issued_samples + self._read_ahead + self._global_batch_size)
        if self._batches is None:
            self._batches = iter(self._loader)
        for _ in range(self._micro_steps):
            read = next(self._batches)
            unscored = self._settle(read)
            yield read.tokens.to(self._device, non_blocking=True), None if unscored is None else unscored.to(self._device)
