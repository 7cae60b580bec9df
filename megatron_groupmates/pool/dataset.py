"""What the trainer's data loader reads: a dataset of pool rows and the sampler that orders them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader


class PoolDataset(torch.utils.data.Dataset):
    """Pool row to training sequence.

    Args:
        index: the pool.
        sequence_length: of the model; a sample has one token more, the last target.

    Raises:
        UserError: a sample of the pool has another length.
    """

    def __init__(self, index: PoolIndex, sequence_length: int) -> None:
        other = np.flatnonzero(index.lengths != sequence_length + 1)
        if other.size:
            raise UserError(
                f"training sequences of {sequence_length} tokens need samples of {sequence_length + 1} "
                f"tokens, but {other.size} of the {index.num_samples} samples of {index.directory} differ "
                f"(the first has {index.lengths[other[0]]}); preprocess with --pack {sequence_length + 1}, "
                "or set the sequence length to the pool's"
            )
        self._reader = PoolReader(index)

    def __len__(self) -> int:
        return self._reader.index.num_samples

    def __getitem__(self, row: int) -> torch.Tensor:
        """Token ids of pool row ``row``, int64[sequence_length + 1]."""
        return torch.from_numpy(self._reader.read(row))


class OrderBatchSampler:
    """Endless micro-batches of pool rows for one data-parallel rank.

    As Megatron's pretraining sampler: a micro step takes ``micro_batch_size * data_parallel_size`` consecutive global
    samples, of which rank r takes the r-th slice of ``micro_batch_size``.

    The rows of a global batch are looked up together, when its first micro-batch is asked for. A data loader asks ahead
    of training, by the same amount on every rank; an entry added to the log must therefore be in force from
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
        """Global samples below this number have been looked up: their rows can no longer change."""
        return self._issued_samples

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches of this rank, from ``issued_samples`` on."""
        while True:
            rows, _ = self._order_provider().rows(self._issued_samples, self._global_batch_size)
            self._issued_samples += self._global_batch_size
            steps = rows.reshape(-1, self._data_parallel_size, self._micro_batch_size)
            yield from steps[:, self._data_parallel_rank].tolist()
