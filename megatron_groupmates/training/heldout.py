"""The held-out batches of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import pad

from megatron_groupmates.model.losses import IGNORED_LABEL
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.references.examples import HeldOutExamples


class HeldOutData:
    """The first ``num_samples`` rows of a held-out pool, split over data-parallel ranks in batches.

    Longest examples first, so that a batch holds examples of like length. Every rank has the same number of batches, as
    ZeRO-3 needs: where a rank has no example left, its batch scores nothing.

    Args:
        pool: contexts of the model's length, or a reference set of shorter examples.
        sequence_length: of the model.
        num_samples: examples used, from the first; all when None.
        batch_size: examples per forward pass and rank.
        groups: this rank's groups.
        length_multiple: batches are padded to a multiple of so many tokens, as sequence parallelism needs.

    Raises:
        UserError: an example does not fit the model.
    """

    def __init__(
        self,
        pool: PoolIndex,
        sequence_length: int,
        num_samples: int | None,
        batch_size: int,
        groups: ParallelGroups,
        length_multiple: int = 1,
    ) -> None:
        self._examples = HeldOutExamples(pool, sequence_length)
        by_length = np.argsort(-pool.lengths[: num_samples or pool.num_samples], kind="stable")
        self._rows = by_length[groups.data_rank :: groups.data_size]
        self._num_rows_of_any_rank = -(-len(by_length) // groups.data_size)
        self._batch_size = batch_size
        self._device = groups.device
        self._length_multiple = length_multiple

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) int64 ``[b, s]`` on the device, labels -100 where a token is not scored."""
        for first in range(0, self._num_rows_of_any_rank, self._batch_size):
            rows = self._rows[first : first + self._batch_size]
            arrays = self._examples.batch(rows if len(rows) else [0], IGNORED_LABEL)
            tokens, labels = (torch.from_numpy(array).to(self._device) for array in arrays)
            if not len(rows):
                labels = torch.full_like(labels, IGNORED_LABEL)
            padding = -tokens.shape[1] % self._length_multiple
            yield pad(tokens, (0, padding)), pad(labels, (0, padding), value=IGNORED_LABEL)
