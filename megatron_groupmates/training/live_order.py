"""The sample order of a running trainer: grows by epoch entries when samples run out, and by adoptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_groupmates.pool.contexts import Packing
from megatron_groupmates.pool.log import LogEntry, log_digest
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry
from megatron_groupmates.pool.rowset import as_packed


class LiveOrder:
    """The order in force, the same on every rank.

    Args:
        num_pool_samples: rows in the pool.
        seed: seed of the data order.
        entries: the generation log so far.
        masks: bool[num_pool_samples] for each generation in ``entries``, or the same packed.
        commit: called with each new epoch entry before any rank uses it (rank 0 appends it to the log); must be
            safe to call on every rank at the same point.
        excluded: bool[num_pool_samples], rows that no generation may serve; None for no such row.
        packing: how rows become samples; None where each row is one.
    """

    def __init__(
        self,
        num_pool_samples: int,
        seed: int,
        entries: Sequence[LogEntry],
        masks: Mapping[int, np.ndarray],
        commit: Callable[[LogEntry], None],
        excluded: np.ndarray | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.current = SampleOrder(num_pool_samples, seed, entries, masks, packing, excluded)
        self._rows = as_packed(masks[entries[-1].generation])
        self._commit = commit

    @property
    def generation(self) -> int:
        """The newest generation of the log, in force now or from a later sample on."""
        return self.current.entries[-1].generation

    def rows(self, first_sample: int, count: int) -> np.ndarray:
        """Pool rows int64[count] of the global samples from ``first_sample`` on; see :meth:`ensure`."""
        return self.current.rows(first_sample, count)[0]

    def ensure(self, stop: int) -> None:
        """Commit epoch entries until every global sample below ``stop`` has a row.

        Collective in effect: every rank must call with the same ``stop`` at the same point.
        """
        while self.current.exhausted_at() < stop:
            entry = next_epoch_entry(self.current)
            self._commit(entry)
            self.current = self.current.extended(entry, self._rows)

    def adopt(self, extended: SampleOrder, mask: np.ndarray) -> None:
        """Follow ``extended``, the current order with one more, already committed, entry of the generation of ``mask``.

        ``mask`` is bool[num_pool_samples] or the same packed.
        """
        assert extended.entries[:-1] == self.current.entries
        self.current = extended
        self._rows = as_packed(mask)


def consumed_log_digest(entries: Sequence[LogEntry], consumed_train_samples: int, exclusion_digest: str) -> str:
    """Digest of the part of the log that the first ``consumed_train_samples`` samples depend on.

    Generation 0 is the whole pool but for the excluded samples whatever its directory says, so that a run may switch
    selection on later; ``exclusion_digest`` (empty where nothing is excluded) stands in for its own.
    """
    relevant = [entry for entry in entries if entry.effective_sample < max(1, consumed_train_samples)]
    return log_digest([dataclasses.replace(entry, digest=exclusion_digest) if entry.generation == 0 else entry for entry in relevant])
