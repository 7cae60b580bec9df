"""What the trainer's data loader reads: a dataset of contexts and the sampler that orders them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.contexts import Contexts
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import DamagedSample, PoolReader


class ReadContexts(NamedTuple):
    """Contexts with their tokens.

    Attributes:
        contexts: what was asked for.
        tokens: int64 ``[n, length]``; end-of-text tokens where a row could not be read.
        damage: pool row to the reason, for each row that could not be read.
    """

    contexts: Contexts
    tokens: torch.Tensor
    damage: dict[int, str]


def read_contexts(reader: PoolReader, contexts: Contexts) -> ReadContexts:
    """Read contexts of one length; rows that cannot be read are reported, not raised, so that a worker process can."""
    whole = len(contexts.rows) == len(contexts) and bool((contexts.num_tokens == reader.index.lengths[contexts.rows]).all())
    try:
        tokens = reader.read_batch(contexts.rows) if whole else _joined(reader, contexts, {})
        return ReadContexts(contexts, torch.from_numpy(tokens), {})
    except DamagedSample:
        damage = _find_damage(reader, np.unique(contexts.rows))
        return ReadContexts(contexts, torch.from_numpy(_joined(reader, contexts, damage)), damage)


def _find_damage(reader: PoolReader, rows: np.ndarray) -> dict[int, str]:
    damage = {}
    for row in rows.tolist():
        try:
            reader.read(row)
        except DamagedSample as error:
            damage[row] = str(error)
    return damage


def _joined(reader: PoolReader, contexts: Contexts, damage: dict[int, str]) -> np.ndarray:
    """The contexts' tokens int64 ``[n, length]``, with end-of-text tokens for the rows in ``damage``."""
    rows = [row for row in np.unique(contexts.rows).tolist() if row not in damage]
    found = dict(zip(rows, reader.read_many(rows), strict=True))
    tokens = np.full((len(contexts), contexts.num_tokens.sum() // max(1, len(contexts))), reader.index.eot_id, dtype=np.int64)
    flat, place = tokens.reshape(-1), 0
    for row, first, count in zip(contexts.rows.tolist(), contexts.first_token.tolist(), contexts.num_tokens.tolist(), strict=True):
        if row in found:
            flat[place : place + count] = found[row][first : first + count]
        place += count
    return tokens


class ContextDataset(torch.utils.data.Dataset):
    """What :class:`OrderBatchSampler` asks for, read: its data loader needs :func:`as_they_are` for its ``collate_fn``."""

    def __init__(self, index: PoolIndex) -> None:
        self._reader = PoolReader(index)

    def __getitems__(self, contexts: Contexts) -> ReadContexts:
        """Read one micro-batch."""
        return read_contexts(self._reader, contexts)


def as_they_are(batch: ReadContexts) -> ReadContexts:
    """The dataset makes whole batches: nothing is left to collate."""
    return batch


class OrderBatchSampler:
    """Endless micro-batches for one data-parallel rank.

    As Megatron's pretraining sampler: a micro step takes ``micro_batch_size * data_parallel_size`` consecutive global
    samples, of which rank r takes the r-th slice of ``micro_batch_size``.

    The contexts of a global batch are looked up together, when its first micro-batch is asked for. A data loader asks
    ahead of training, by the same amount on every rank; an entry added to the log must therefore be in force from
    ``issued_samples`` on at the earliest, and the order must reach ``issued_samples + global_batch_size`` before the
    loader is asked for the next batch.

    Args:
        order_provider: gives the sample order now in force.
        consumed_samples: first global sample (Megatron's ``consumed_train_samples``).
        micro_batch_size: sequences per rank and micro step.
        data_parallel_rank: of this process.
        data_parallel_size: number of data-parallel ranks.
        global_batch_size: sequences per optimizer step.

    Raises:
        UserError: the global batch is not a whole number of micro steps.
        IndexError: (on iteration) the order ends within the batch asked for.
    """

    def __init__(
        self,
        order_provider: Callable[[], SampleOrder],
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        global_batch_size: int,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x data_parallel_size {data_parallel_size}; change one of them"
            )
        assert 0 <= data_parallel_rank < data_parallel_size
        self._order_provider = order_provider
        self._issued_samples = consumed_samples
        self._micro_batch_size = micro_batch_size
        self._data_parallel_rank = data_parallel_rank
        self._data_parallel_size = data_parallel_size
        self._global_batch_size = global_batch_size

    @property
    def issued_samples(self) -> int:
        """Global samples below this number have been looked up: what they are made of can no longer change."""
        return self._issued_samples

    def __iter__(self) -> Iterator[Contexts]:
        """Micro-batches of this rank, from ``issued_samples`` on."""
        while True:
            contexts = self._order_provider().contexts(self._issued_samples, self._global_batch_size)
            self._issued_samples += self._global_batch_size
            mine = self._data_parallel_rank * self._micro_batch_size
            for first in range(mine, self._global_batch_size, self._micro_batch_size * self._data_parallel_size):
                yield contexts.part(first, first + self._micro_batch_size)
