"""Reading samples: one positioned read each."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex

_NUM_OPEN_FILES = 256  # well below the usual limit of 1,024 descriptors per process


def decode_json_member(content: bytes) -> np.ndarray:
    """Ids of a DCLM member, int64[length].

    Raises:
        ValueError: ``content`` is not the gzip of a JSON list of whole numbers.
    """
    try:
        tokens = json.loads(gzip.decompress(content))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"not a gzip file: {error}") from error
    array = np.array(tokens) if isinstance(tokens, list) else np.empty(0)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind != "i":
        raise ValueError("not a JSON list of token ids")
    return array.astype(np.int64)


class PoolReader:
    """Reads the samples of a pool by pool row.

    Reads are positioned (``os.pread``), so processes forked from this one may go on using the same descriptors; a
    pickled reader opens its own. Not for several threads at once.
    """

    def __init__(self, index: PoolIndex) -> None:
        self.index = index
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_descriptors": OrderedDict()}

    def read(self, row: int) -> np.ndarray:
        """Token ids of the sample at pool row ``row``, int64[length].

        Raises:
            IndexError: the row is not in the pool.
            UserError: the shard cannot be read or its content is damaged; names shard and row.
        """
        index = self.index
        if not 0 <= row < index.num_samples:
            raise IndexError(f"pool row {row} is not in range({index.num_samples})")
        shard = int(np.searchsorted(index.first_row, row, side="right")) - 1
        num_bytes = int(index.member_bytes[row])
        try:
            content = os.pread(self._descriptor(shard), num_bytes, int(index.offsets[row]))
            if len(content) != num_bytes:
                raise ValueError(f"{num_bytes} bytes expected, the file ends after {len(content)}")
            tokens = self._decode(content)
            if len(tokens) != index.lengths[row]:
                raise ValueError(f"{index.lengths[row]} tokens expected, found {len(tokens)}")
            if tokens.min() < 0 or tokens.max() >= index.vocab_size:
                raise ValueError(f"token ids from {tokens.min()} to {tokens.max()}, the vocabulary has {index.vocab_size}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{index.shard_path(shard)}, row {row - index.first_row[shard]}: cannot read the sample: "
                f"{error}; restore the shard or make the pool again"
            ) from error
        return tokens

    def read_many(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids of several samples, in the order asked for; errors as :meth:`read`."""
        return [self.read(int(row)) for row in rows]

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _decode(self, content: bytes) -> np.ndarray:
        if self.index.member_format == "json.gz":
            return decode_json_member(content)
        return np.frombuffer(content, dtype=np.dtype(self.index.token_dtype).newbyteorder("<")).astype(np.int64)

    def _descriptor(self, shard: int) -> int:
        """Open descriptor of shard number ``shard``; the least recently used one beyond the limit is closed."""
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(self.index.shard_path(shard), os.O_RDONLY)
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > _NUM_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor
