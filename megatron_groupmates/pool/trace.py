"""Which data a training step saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.dataset import read_contexts
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.skips import Skip, blank_skipped

_NUM_SAMPLES = 1024


def trace(index: PoolIndex, order: SampleOrder, start: int, stop: int, skips: Set[Skip] = frozenset()) -> Iterator[dict[str, Any]]:
    """For each global sample in range(start, stop), where its tokens come from.

    Args:
        index: the pool.
        order: of the run, with the pool's lengths.
        start, stop: range of global samples.
        skips: what the run left out.

    Yields:
        ``{"sample", "generation", "sources": [[shard, row, first_token, num_tokens], ...], "tokens_sha256"}``;
        ``tokens_sha256`` is the hex SHA-256 of the sample's ids as little-endian uint32, as it was trained on. A sample
        of which a part was left out also has ``"skipped": true``.

    Raises:
        IndexError: the log does not reach ``stop``.
        UserError: a sample cannot be read, or is one of those before selection was switched on in the run.
    """
    if start < (begin := order.entries[0].effective_sample):
        raise UserError(
            f"sample {start} was trained on before selection was switched on at sample {begin}: it did not come from the pool; "
            f"trace from {begin} on"
        )
    reader = PoolReader(index)
    for first in range(start, stop, _NUM_SAMPLES):
        contexts = order.contexts(first, min(_NUM_SAMPLES, stop - first))
        read = read_contexts(reader, contexts)
        blank, unsettled = blank_skipped(index, read, skips)
        if unsettled:
            raise UserError(unsettled[0].error)
        shards, rows_in_shard = index.locate(contexts.rows)
        pieces = [
            [index.shard_names[shard], *place]
            for shard, *place in zip(
                shards.tolist(), rows_in_shard.tolist(), contexts.first_token.tolist(), contexts.num_tokens.tolist(), strict=True
            )
        ]
        ids = read.tokens.numpy().astype("<u4")
        for number in range(len(contexts)):
            line = {
                "sample": int(contexts.samples[number]),
                "generation": int(contexts.generations[number]),
                "sources": pieces[contexts.first_piece[number] : contexts.first_piece[number + 1]],
                "tokens_sha256": hashlib.sha256(ids[number].tobytes()).hexdigest(),
            }
            skipped = blank is not None and bool(blank[number].any())
            yield {**line, "skipped": True} if skipped else line
