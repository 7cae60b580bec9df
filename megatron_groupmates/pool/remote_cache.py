"""A bounded cache of pool members on local disk, shared by the processes of a host.

Below ``<directory>/shards`` each remote shard has one sparse file: a table of checksums, one uint32 for each 512-byte
block of the tar in which a member may begin (0: not kept), then members at the places they have in the tar. What a
crash, another process or a bad disk did to a file shows in the checksum, and the member is fetched again.

The bound is on disk space. Whoever adds members takes the lock, adds to the count in ``<directory>/shards/usage`` and,
where it would pass the bound, first deletes the files that have not been used for longest. Files are opened for each
batch, so one that was deleted is gone at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from isal import isal_zlib

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import sha256_bytes

logger = logging.getLogger(__name__)

_TAR_BLOCK = 512
_CHECKSUM_BYTES = 4
_DISK_BLOCK = 4096
_KEPT_SHARE = 0.9  # deleting makes room for more than the next member
_TOUCH_SECONDS = 60.0


class MemberCache:
    """Members of one pool.

    Args:
        directory: of the cache, for all pools.
        content_key: names the content of the pool.
        shard_sizes: int64[num_shards], bytes of each shard.
        max_bytes: bound on the disk space of all pools in ``directory``.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, content_key: str, shard_sizes: np.ndarray, max_bytes: int) -> None:
        self._root = directory / "shards"
        self._directory = self._root / sha256_bytes(content_key.encode())[:32]
        self._table_bytes = -(-(shard_sizes // _TAR_BLOCK + 1) * _CHECKSUM_BYTES // _DISK_BLOCK) * _DISK_BLOCK
        self._max_bytes = max_bytes
        self._touched: dict[int, float] = {}
        self._gave_up = False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep samples of a remote pool in {directory}: {error}; set data.cache_directory") from error

    def read(self, shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> list[bytes | None]:
        """Members sorted by shard, None for each that is not kept; arguments as ``ShardFiles.read``."""
        members: list[bytes | None] = []
        for shard, first, last in _runs(shards):
            try:
                descriptor = os.open(self._path(shard), os.O_RDONLY)
            except OSError:
                members += [None] * (last - first)
                continue
            try:
                table = int(self._table_bytes[shard])
                for start, size in zip(starts[first:last], sizes[first:last], strict=True):
                    members.append(_read_member(descriptor, table, start, size))
                self._touch(shard, descriptor)
            finally:
                os.close(descriptor)
        return members

    def write(self, shards: Sequence[int], starts: Sequence[int], members: Sequence[bytes]) -> None:
        """Keep members sorted by shard. A disk that does not take them is reported once, then left alone."""
        if self._gave_up:
            return
        try:
            # For each file a block of the table and the one in which the file system notes where its blocks are.
            num_bytes = sum(_disk_bytes(len(member)) for member in members) + sum(2 * _DISK_BLOCK for _ in _runs(shards))
            if num_bytes > self._max_bytes * _KEPT_SHARE:
                return
            self._make_room(num_bytes)
            for shard, first, last in _runs(shards):
                descriptor = os.open(self._path(shard), os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    table = int(self._table_bytes[shard])
                    for start, member in zip(starts[first:last], members[first:last], strict=True):
                        # The content first: its checksum says that it is there.
                        os.pwrite(descriptor, member, table + start)
                        os.pwrite(descriptor, _checksum(member), _checksum_place(start))
                finally:
                    os.close(descriptor)
        except OSError as error:
            self._gave_up = True
            logger.warning("samples of the remote pool are no longer kept in %s: %s", self._root, error)

    def forget(self, shard: int, start: int) -> None:
        """Drop a member."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path(shard), os.O_RDWR)
            try:
                os.pwrite(descriptor, bytes(_CHECKSUM_BYTES), _checksum_place(start))
            finally:
                os.close(descriptor)

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard:08d}"

    def _touch(self, shard: int, descriptor: int) -> None:
        """Note the use of a file, now and then: its time of modification decides what is deleted."""
        now = time.monotonic()
        if now - self._touched.get(shard, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[shard] = now
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    def _make_room(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more, after deleting what would not fit beside them."""
        descriptor = os.open(self._root / "usage", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = os.pread(descriptor, 8, 0)
            used = int.from_bytes(content, "little") if len(content) == 8 else _used_bytes(self._root)
            if used + num_bytes > self._max_bytes:
                used = _delete_oldest(self._root, int(self._max_bytes * _KEPT_SHARE) - num_bytes)
            os.pwrite(descriptor, (used + num_bytes).to_bytes(8, "little"), 0)
        finally:
            os.close(descriptor)


def _runs(shards: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(shard, first, one past the last) of each run of equal shard numbers."""
    first = 0
    for shard, run in itertools.groupby(shards):
        last = first + sum(1 for _ in run)
        yield shard, first, last
        first = last


def _checksum(member: bytes) -> bytes:
    return (isal_zlib.crc32(member) or 1).to_bytes(_CHECKSUM_BYTES, "little")


def _checksum_place(start: int) -> int:
    return start // _TAR_BLOCK * _CHECKSUM_BYTES


def _read_member(descriptor: int, table_bytes: int, start: int, size: int) -> bytes | None:
    try:
        checksum = os.pread(descriptor, _CHECKSUM_BYTES, _checksum_place(start))
        if checksum in (b"", bytes(_CHECKSUM_BYTES)):
            return None
        member = os.pread(descriptor, size, table_bytes + start)
    except OSError:
        return None
    return member if len(member) == size and _checksum(member) == checksum else None


def _disk_bytes(num_bytes: int) -> int:
    """Most disk space that a member and its checksum take, wherever they begin."""
    return (num_bytes // _DISK_BLOCK + 3) * _DISK_BLOCK


def _files(root: Path) -> list[tuple[float, int, Path]]:
    """(time of last use, disk space in bytes, path) of the files kept."""
    found = []
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            found.append((facts.st_mtime, facts.st_blocks * 512, path))
    return sorted(found)


def _used_bytes(root: Path) -> int:
    return sum(num_bytes for _, num_bytes, _ in _files(root))


def _delete_oldest(root: Path, max_bytes: int) -> int:
    """Delete the files that have not been used for longest until the rest takes at most ``max_bytes``; what it takes."""
    files = _files(root)
    used = sum(num_bytes for _, num_bytes, _ in files)
    for _, num_bytes, path in files:
        if used <= max_bytes:
            break
        path.unlink(missing_ok=True)
        used -= num_bytes
    return used
