"""Which data a training step saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader

_NUM_ROWS = 1024


def trace(index: PoolIndex, order: SampleOrder, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """For each global sample in range(start, stop), where its tokens come from.

    Yields:
        ``{"sample", "generation", "sources": [[shard, row, first_token, num_tokens], ...], "tokens_sha256"}``;
        ``tokens_sha256`` is the hex SHA-256 of the sample's ids as little-endian uint32.

    Raises:
        IndexError: the log does not reach ``stop``.
        UserError: a sample cannot be read.
    """
    reader = PoolReader(index)
    for first in range(start, stop, _NUM_ROWS):
        rows, generations = order.rows(first, min(_NUM_ROWS, stop - first))
        shards, rows_in_shard = index.locate(rows)
        for offset, row in enumerate(rows):
            tokens = reader.read(int(row))
            yield {
                "sample": first + offset,
                "generation": int(generations[offset]),
                "sources": [[index.shard_names[shards[offset]], int(rows_in_shard[offset]), 0, len(tokens)]],
                "tokens_sha256": hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest(),
            }
