"""Reading samples: positioned reads, several at a time, each checked; failures are retried, then named."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.members import decode_members
from megatron_groupmates.pool.remote import RemoteShards
from megatron_groupmates.pool.shards import LocalShards, ShardFiles
from megatron_groupmates.utils.storage import is_remote

logger = logging.getLogger(__name__)

_RETRY_SECONDS = (0.1, 1.0, 5.0, 20.0)  # waits between attempts at a read that the storage refused
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # trying again does not help


class DamagedSample(UserError):
    """A sample that cannot be read or decoded, after retries.

    Attributes:
        row: pool row.
        shard_name: name of its shard.
        row_in_shard: its row there.
    """

    def __init__(self, message: str, row: int = -1, shard_name: str = "", row_in_shard: int = -1) -> None:
        # The message alone is enough: torch's data loader makes a worker's exception again from nothing else.
        super().__init__(message)
        self.row, self.shard_name, self.row_in_shard = row, shard_name, row_in_shard


class PoolReader:
    """Reads the samples of a pool by pool row, local or remote as the index says.

    Processes forked from this one may go on using it; a pickled reader opens its own descriptors. Not for several
    threads at once.

    Every method raises:
        IndexError: a row is not in the pool.
        DamagedSample: a shard cannot be read or its content is damaged. A read that the storage refuses was tried
            again a few times before, content that does not decode once.
    """

    def __init__(self, index: PoolIndex) -> None:
        self.index = index
        self._files: ShardFiles = (
            RemoteShards(index.shard_path, index.shard_sizes, index.content_key, index.remote)
            if is_remote(index.shard_directory)
            else LocalShards(index.shard_path)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolReader, (self.index,)

    def read(self, row: int) -> np.ndarray:
        """Token ids of the sample at pool row ``row``, int64[length]."""
        return self.read_many([row])[0]

    def read_batch(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids of samples of one length, in the order asked for, int64 ``[n, length]``.

        Raises:
            UserError: the samples differ in length.
        """
        rows = np.asarray(rows, dtype=np.int64)
        batch: np.ndarray | None = None
        for places, lengths, members in self._read(rows):
            if batch is None:
                batch = np.empty((len(rows), lengths[0]), np.int64)
            if lengths.count(batch.shape[1]) < len(lengths):
                both = f"{batch.shape[1]} and {next(length for length in lengths if length != batch.shape[1])} tokens"
                raise UserError(f"samples of {both} do not make a batch; use samples of one length")
            if isinstance(members, np.ndarray):
                batch[places] = members
            else:
                for place, tokens in zip(places.tolist(), members, strict=True):
                    batch[place] = tokens
        return np.empty((0, 0), np.int64) if batch is None else batch

    def read_many(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids of samples of any lengths, in the order asked for, each int64[length]."""
        rows = np.asarray(rows, dtype=np.int64)
        samples: list[Any] = [None] * len(rows)
        for places, _, members in self._read(rows):
            for place, tokens in zip(places.tolist(), members, strict=True):
                samples[place] = tokens.astype(np.int64)
        return samples

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._files.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _read(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[int], np.ndarray | list[np.ndarray]]]:
        """Samples in the order in which they lie: places in ``rows``, their lengths, and what ``decode_members`` gives."""
        if not rows.size:
            return
        order = rows.argsort()
        rows = rows.take(order)
        for row in (int(rows[0]), int(rows[-1])):
            if not 0 <= row < self.index.num_samples:
                raise IndexError(f"pool row {row} is not in range({self.index.num_samples})")
        sizes, lengths = self.index.member_bytes.take(rows).tolist(), self.index.lengths.take(rows).tolist()
        for part in _parts(sizes, self._files.batch_bytes):
            try:
                members = self._read_once(rows[part], sizes[part], lengths[part])
            except (OSError, ValueError):
                # One of them is at fault: each by itself, so that the others are read and that one is named.
                members = [self._read_patiently(row) for row in rows[part].tolist()]
            yield order[part], lengths[part], members

    def _read_once(self, rows: np.ndarray, sizes: list[int], lengths: list[int]) -> np.ndarray | list[np.ndarray]:
        index = self.index
        shards = (index.first_row.searchsorted(rows, side="right") - 1).tolist()
        content, starts = self._files.read(shards, index.offsets.take(rows).tolist(), sizes)
        return decode_members(content, starts, sizes, lengths, index.member_format, index.token_dtype, index.vocab_size)

    def _read_patiently(self, row: int) -> np.ndarray:
        index = self.index
        shard = int(np.searchsorted(index.first_row, row, side="right")) - 1
        row_in_shard = row - int(index.first_row[shard])
        refused = damaged = 0
        while True:
            try:
                return self._read_once(np.array([row]), [int(index.member_bytes[row])], [int(index.lengths[row])])[0]
            except ValueError as error:
                problem: Exception = error
                final, damaged = damaged == 1, damaged + 1
            except OSError as error:
                problem = error
                final, refused = refused == len(_RETRY_SECONDS) or isinstance(error, _LASTING), refused + 1
            message = f"{index.shard_path(shard)}, row {row_in_shard}: cannot read the sample: {problem}"
            if final:
                is_outage = isinstance(problem, OSError) and not isinstance(problem, _LASTING)
                advice = "check the disk or network it lies on" if is_outage else "restore the shard or make the pool again"
                raise DamagedSample(f"{message}; {advice}", row, index.shard_names[shard], row_in_shard) from problem
            logger.warning("%s; trying again", message)
            self._files.forget(shard, int(index.offsets[row]))
            if isinstance(problem, OSError):
                time.sleep(_RETRY_SECONDS[refused - 1])


def _parts(sizes: list[int], max_bytes: int) -> list[slice]:
    """Cut members into parts of about ``max_bytes``: one begins where the bytes so far pass a multiple of that."""
    if sum(sizes) <= max_bytes:
        return [slice(None)]
    blocks = [so_far // max_bytes for so_far in itertools.accumulate(sizes)]
    bounds = [0, *(number for number in range(1, len(blocks)) if blocks[number] != blocks[number - 1]), len(blocks)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]
