"""Getting members out of token shards on a local or network file system."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

_MAX_OPEN_FILES = 4096
_MAX_GAP_BYTES = 1 << 14  # copying so much from the page cache costs no more than another system call
_MAX_RANGE_BYTES = 1 << 23


class ShardFiles(Protocol):
    """Where a reader gets its bytes from.

    Attributes:
        batch_bytes: members worth reading together, in bytes.
    """

    batch_bytes: int

    def read(self, shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> tuple[bytes, Sequence[int]]:
        """Read members, sorted by shard and place.

        Args:
            shards: shard numbers.
            starts: where each member's data begins in its shard.
            sizes: bytes of each.

        Returns:
            Bytes that hold all of them, and where in these each begins.

        Raises:
            OSError: a shard cannot be read.
            ValueError: a shard ends too early.
        """

    def forget(self, shard: int, start: int) -> None:
        """Keep nothing of a member that turned out unreadable: the next read takes it from the shard itself."""

    def close(self) -> None:
        """Give up what is held open; a later read opens it again."""


def join_ranges(
    shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int], max_gap: int, max_bytes: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Join members that lie near each other to ranges that are read at once.

    Args:
        shards, starts, sizes: as :meth:`ShardFiles.read`.
        max_gap: bytes between two members that are read for nothing rather than left out.
        max_bytes: of a range, unless a single member is longer.

    Returns:
        Ranges (shard, start, stop), and where each member begins in their concatenation.
    """
    ranges: list[tuple[int, int, int]] = []
    places: list[int] = []
    current, begin, stop, base = -1, 0, 0, 0
    for shard, start, size in zip(shards, starts, sizes, strict=True):
        if shard != current or start - stop > max_gap or start + size - begin > max_bytes:
            if current >= 0:
                ranges.append((current, begin, stop))
            base += stop - begin
            current, begin, stop = shard, start, start + size
        elif start + size > stop:
            stop = start + size
        places.append(base + start - begin)
    if current >= 0:
        ranges.append((current, begin, stop))
    return ranges, places


class LocalShards:
    """Positioned reads (``os.pread``) of local files.

    Processes forked from this one may go on using the same descriptors. Not memory-mapped: a disk that fails would
    end the process with SIGBUS instead of an error that names the shard.

    Args:
        path: of a shard, by its number.
    """

    batch_bytes = 1 << 23

    def __init__(self, path: Callable[[int], Path | str]) -> None:
        self._path = path
        # A process has a few readers, and other things to open. Beside the usual limit of 1,024 this is 256.
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._num_open = _MAX_OPEN_FILES if soft_limit == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, soft_limit // 4)
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> tuple[bytes, Sequence[int]]:
        """See :class:`ShardFiles`."""
        ranges, places = join_ranges(shards, starts, sizes, _MAX_GAP_BYTES, _MAX_RANGE_BYTES)
        parts = []
        for shard, start, stop in ranges:
            part = os.pread(self._descriptor(shard), stop - start, start)
            if len(part) != stop - start:
                raise ValueError(f"{stop - start} bytes expected, the file ends after {len(part)}")
            parts.append(part)
        return b"".join(parts), places

    def forget(self, shard: int, start: int) -> None:
        """Close the shard: its descriptor may have gone stale."""
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        """Open descriptor of shard number ``shard``; the least recently used one beyond the limit is closed."""
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            self._descriptors.move_to_end(shard)
            return descriptor
        descriptor = self._descriptors[shard] = os.open(self._path(shard), os.O_RDONLY)
        if len(self._descriptors) > self._num_open:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor
