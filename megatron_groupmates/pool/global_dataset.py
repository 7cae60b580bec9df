"""Map-style datasets over global sample numbers, for trainers that bring their own sampler and data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.contexts import Contexts, join_contexts
from megatron_groupmates.pool.dataset import read_contexts
from megatron_groupmates.pool.generation import load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.references.examples import is_reference_set
from megatron_groupmates.pool.rowset import pack_rows
from megatron_groupmates.pool.shared_log import SharedLog

Item = Callable[[np.ndarray], dict[str, Any]]
"""Tokens int64[sequence_length + 1] -> what the trainer's loader collates."""


class GlobalSampleDataset(torch.utils.data.Dataset):
    """The training samples by global sample number (Megatron's ``consumed_train_samples`` counting).

    It may be read in any order, by any number of processes that a data loader starts, forked or spawned, before or after a
    new generation is adopted: they follow ``shared``. A number that is not settled there is refused, never guessed.

    Args:
        index: the pool.
        selection_dir: where the log's generations are.
        order: the order in force, with all entries of ``shared`` or fewer.
        shared: what the trainer's processes know of the log.
        num_samples: length that the dataset claims, the samples of the whole run.
        block_size: consecutive global samples looked up together; a global batch.
        item: makes an item.
    """

    def __init__(
        self,
        index: PoolIndex,
        selection_dir: Path,
        order: SampleOrder,
        shared: SharedLog,
        num_samples: int,
        block_size: int,
        item: Item,
    ) -> None:
        self._reader = PoolReader(index)
        self._selection_dir = selection_dir
        self._order = order
        self._shared = shared
        self._num_samples = num_samples
        self._block_size = block_size
        self._item = item
        self._rows: tuple[int, np.ndarray] | None = None  # number of the newest generation read here, its packed rows
        self._block: Contexts | None = None

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """The item of one global sample."""
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """The items of these global samples.

        Raises:
            UserError: a sample is not settled yet, was trained on before the log begins, or cannot be read.
        """
        read = read_contexts(self._reader, join_contexts([self._contexts(first, count) for first, count in self._runs(samples)]))
        if read.damage:
            raise UserError(next(iter(read.damage.values())))
        return [self._item(tokens) for tokens in read.tokens.numpy()]

    def _runs(self, samples: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first, count) of stretches of consecutive numbers that lie in one block."""
        first, count = int(samples[0]), 0
        for sample in samples:
            if count and (sample != first + count or sample % self._block_size == 0):
                yield first, count
                first, count = int(sample), 0
            count += 1
        yield first, count

    def _contexts(self, first: int, count: int) -> Contexts:
        block = self._block
        if block is None or not block.samples[0] <= first <= first + count - 1 <= block.samples[-1]:
            block = self._block = self._look_up(first, first + count)
        start = first - int(block.samples[0])
        return block.part(start, start + count)

    def _look_up(self, first: int, stop: int) -> Contexts:
        """The settled samples of the block that holds samples ``first`` to ``stop - 1``."""
        settled, begin = self._shared.settled(), self._order.entries[0].effective_sample
        if stop > settled:
            raise UserError(
                f"global sample {stop - 1} was asked for, but which data it is made of is settled up to {settled - 1} only: the "
                "data loader reads farther ahead than its 2 micro-batches per worker; leave its prefetch factor as it is"
            )
        if first < begin:
            raise UserError(f"global sample {first} was asked for, but the generation log begins at {begin}: what came before is not in it")
        self._follow()
        start = first // self._block_size * self._block_size
        start, stop = max(start, begin), min(start + self._block_size, settled)
        return self._order.contexts(start, stop - start)

    def _follow(self) -> None:
        for entry in self._shared.entries_from(len(self._order.entries)):
            self._order = self._order.extended(entry, self._selected(entry))

    def _selected(self, entry: LogEntry) -> np.ndarray:
        """Packed rows of the entry's generation, read and verified once."""
        if self._rows is None or self._rows[0] != entry.generation:
            generation = load_generation(self._selection_dir, entry.generation, self._reader.index)
            if generation.digest != entry.digest:
                raise UserError(
                    f"generation {entry.generation} in {self._selection_dir} has digest {generation.digest}, the log says {entry.digest}; "
                    "restore the generation the log was written with"
                )
            self._rows = entry.generation, pack_rows(generation.mask)
        return self._rows[1]


class HeldOutDataset(torch.utils.data.Dataset):
    """A held-out pool's samples in pool order, from the first again when they run out, for a trainer's own validation.

    Args:
        index: the held-out pool, with samples of ``sequence_length + 1`` tokens.
        sequence_length: of the model.
        num_samples: length that the dataset claims.
        item: makes an item.

    Raises:
        UserError: samples of another length, or a reference set, whose unscored tokens this validation would score.
    """

    def __init__(self, index: PoolIndex, sequence_length: int, num_samples: int, item: Item) -> None:
        if is_reference_set(index) or (index.lengths != sequence_length + 1).any():
            raise UserError(
                f"{index.directory} is not a pool of samples of {sequence_length + 1} tokens, which validation needs; "
                f"preprocess held-out text with --pack {sequence_length + 1}"
            )
        self._reader = PoolReader(index)
        self._num_samples = num_samples
        self._item = item

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """The item of one sample."""
        return self._item(self._reader.read(sample % self._reader.index.num_samples))
