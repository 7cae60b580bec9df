"""Samples that cannot be read in mid-run: training ends, or leaves them out and records it (``data.on_damaged_sample``)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_groupmates.config import Config, RunPaths, UserError
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.dataset import ReadContexts
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import DamagedSample
from megatron_groupmates.pool.skips import Skip, append_skip, blank_skipped, read_skips, skips_digest
from megatron_groupmates.utils.files import write_text

logger = logging.getLogger(__name__)

_NUM_LISTED = 20


class DamageGuard:
    """Decides, the same on every rank, what becomes of samples that cannot be read.

    What ``skipped.jsonl`` records is left out whatever the policy and whether or not it can be read by now: a global
    sample is the same at every reading. For the same reason a sample that was trained on before is never left out anew.
    Collective: every rank must create one.

    Args:
        config: the run.
        paths: of the run.
        pool: the run's pool.
        groups: this rank's groups.
        trained_samples: global samples below this number were trained on before, by this start or an earlier one.
        on_event: called on every rank with a metrics row for each sample newly left out.

    Raises:
        UserError: the record is damaged.
    """

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        pool: PoolIndex,
        groups: ParallelGroups,
        trained_samples: int,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._policy = config.data.on_damaged_sample
        self._limit = config.data.max_skipped_samples
        self._path = paths.skipped_samples
        self._pool = pool
        self._groups = groups
        self._trained_samples = trained_samples
        self._on_event = on_event
        if groups.is_main and config.checkpoint.load is not None and not self._path.exists():
            self._inherit(RunPaths.below(Path(config.checkpoint.load).parent))
        groups.barrier()
        self._skips = set(read_skips(self._path))

    def digest(self, consumed_train_samples: int) -> str:
        """Identifies what is left out of the first ``consumed_train_samples`` samples; empty where nothing is."""
        return skips_digest(self._skips, consumed_train_samples)

    def settle(self, read: ReadContexts) -> torch.Tensor | None:
        """Put end-of-text tokens, in place, where a sample is left out.

        Collective where the policy is ``skip``: every rank must call with its own micro-batch, ranks of a tensor-parallel
        group with the same contexts, of which each may have failed to read others.

        Returns:
            bool ``[n, length]``, True for the tokens that must carry no loss; None where there are none.

        Raises:
            DamagedSample: a sample cannot be read, and must not or cannot be left out.
            UserError: more are left out than the limit allows.
        """
        blank, unsettled = blank_skipped(self._pool, read, self._skips)
        if self._policy == "raise":
            if unsettled:
                raise DamagedSample(unsettled[0].error)
            return blank
        if self._anywhere(bool(unsettled)):
            self._skip(unsettled)
            blank, unsettled = blank_skipped(self._pool, read, self._skips)
            assert not unsettled
        return blank

    def _inherit(self, parent: RunPaths) -> None:
        """A run that branches from another begins with what that one left out of the samples consumed till then."""
        inherited = [skip for skip in read_skips(parent.skipped_samples) if skip.sample < self._trained_samples]
        write_text(self._path, "".join(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in inherited))

    def _anywhere(self, here: bool) -> bool:
        flag = torch.tensor(here, dtype=torch.int32, device=self._groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _skip(self, unsettled: list[Skip]) -> None:
        """Agree on what is left out from now on and commit it, before any rank trains on it."""
        gathered: list[Any] = [None] * self._groups.world_size
        dist.all_gather_object(gathered, unsettled)
        new = sorted({skip for part in gathered for skip in part})
        for skip in new:
            if skip.sample < self._trained_samples:
                raise DamagedSample(
                    f"{skip.error}; global sample {skip.sample} was trained on before this start, so it cannot be skipped now: "
                    "the run would no longer be the same"
                )
        if len(self._skips) + len(new) > self._limit:
            listed = [f"sample {skip.sample}: shard {skip.shard}, row {skip.row}: {skip.error}" for skip in sorted(self._skips | set(new))]
            more = [f"and {len(listed) - _NUM_LISTED} more"] if len(listed) > _NUM_LISTED else []
            raise UserError(
                f"{len(listed)} samples cannot be read, data.max_skipped_samples is {self._limit}; restore the shards, or raise the "
                "limit:\n  " + "\n  ".join(listed[:_NUM_LISTED] + more)
            )
        for skip in new:
            logger.warning("global sample %d: shard %s, row %d is skipped: %s", skip.sample, skip.shard, skip.row, skip.error)
            if self._groups.is_main:
                append_skip(self._path, skip)
        self._groups.barrier()
        self._skips |= set(new)
        for skip in new:
            self._on_event({"event": "skipped_sample", "sample": skip.sample, "shard": skip.shard, "row": skip.row, "error": skip.error})
