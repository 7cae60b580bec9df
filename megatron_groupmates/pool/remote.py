"""Pools in object stores: local copies of the index, and range reads of the shards through a bounded cache on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.pool.remote_cache import MemberCache
from megatron_groupmates.pool.shards import join_ranges
from megatron_groupmates.utils.files import atomic_file, sha256_bytes, sha256_file
from megatron_groupmates.utils.storage import join, open_input, read_ranges

DEFAULT_CACHE_DIRECTORY = "~/.cache/megatron_groupmates"
DEFAULT_CACHE_BYTES = 10 << 30

_COPY_BYTES = 1 << 23
_MAX_GAP_BYTES = 1 << 17  # takes less time to transfer than another request does
_MAX_RANGE_BYTES = 1 << 23  # longer ranges come in several requests at once


@dataclasses.dataclass(frozen=True)
class RemoteSettings:
    """What this host keeps of remote pools.

    Attributes:
        cache_directory: where; shared by the processes of a host.
        cache_bytes: bound on the samples kept there, over all pools; 0 keeps none. Indices come on top.
    """

    cache_directory: str = DEFAULT_CACHE_DIRECTORY
    cache_bytes: int = DEFAULT_CACHE_BYTES

    @classmethod
    def of(cls, config: Config) -> RemoteSettings:
        """What the run's settings say."""
        return cls(config.data.cache_directory, config.data.cache_bytes)

    @property
    def directory(self) -> Path:
        """``cache_directory`` with ``~`` replaced."""
        return Path(self.cache_directory).expanduser()


def fetch_files(place: str, digests: Mapping[str, str], description: bytes, settings: RemoteSettings, verify: bool) -> Path:
    """Local directory with the small files of a remote pool, fetched by the first process of the host that asks.

    Args:
        place: URL of the pool.
        digests: name of each file to its hex SHA-256.
        description: content of ``pool.json``; another content is another directory.
        settings: where the copies lie.
        verify: check the digests of copies that are there already.

    Raises:
        UserError: the cache cannot be written, or a file is missing or not the one with that digest.
        OSError: the storage fails.
    """
    directory = settings.directory / "pools" / sha256_bytes(description)
    with _exclusive(directory):
        for name, expected in digests.items():
            path = directory / name
            if path.is_file() and (not verify or sha256_file(path) == expected):
                continue
            found = _copy(join(place, name), path, expected)
            if found != expected:
                raise UserError(
                    f"pool {place}: {name} is not the one the pool was made with (SHA-256 {found}, pool.json says {expected}); "
                    "restore it or make the pool again"
                )
    return directory


def _copy(url: str, path: Path, expected: str) -> str:
    """Copy a remote file to ``path`` if its SHA-256 is the one expected; the SHA-256 found, or ``missing``."""

    class OtherContent(Exception):
        pass

    digest = hashlib.sha256()
    try:
        with open_input(url) as source, atomic_file(path) as out:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
                out.write(block)
            if digest.hexdigest() != expected:
                raise OtherContent
    except FileNotFoundError:
        return "missing"
    except OtherContent:
        pass
    return digest.hexdigest()


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process at a time works in ``directory``."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot keep copies of a remote pool in {directory}: {error}; set data.cache_directory") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class RemoteShards:
    """Range requests, those of one batch at the same time; members are kept in a cache on disk.

    Random reads fetch the very bytes of their samples; members that lie near each other, as in a scan of the pool,
    are fetched together. Only members asked for are kept. No file system is held: those do not work after a fork.

    Args:
        path: URL of a shard, by its number.
        sizes: int64[num_shards], bytes of each shard.
        content_key: names the content of the pool in the cache.
        settings: of the cache.
    """

    batch_bytes = 1 << 26

    def __init__(self, path: Callable[[int], Path | str], sizes: np.ndarray, content_key: str, settings: RemoteSettings) -> None:
        self._path = path
        self._cache = MemberCache(settings.directory, content_key, sizes, settings.cache_bytes) if settings.cache_bytes else None

    def read(self, shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> tuple[bytes, Sequence[int]]:
        """See :class:`megatron_groupmates.pool.shards.ShardFiles`."""
        if self._cache is None:
            return self._fetch(shards, starts, sizes)
        members = self._cache.read(shards, starts, sizes)
        missing = [number for number, member in enumerate(members) if member is None]
        if missing:
            wanted = [[column[number] for number in missing] for column in (shards, starts, sizes)]
            content, places = self._fetch(*wanted)
            for number, place, size in zip(missing, places, wanted[2], strict=True):
                members[number] = content[place : place + size]
            self._cache.write(wanted[0], wanted[1], [members[number] for number in missing])
        return b"".join(members), [0, *itertools.accumulate(sizes[:-1])]

    def forget(self, shard: int, start: int) -> None:
        """Drop a member from the cache."""
        if self._cache is not None:
            self._cache.forget(shard, start)

    def close(self) -> None:
        """Nothing is held open."""

    def _fetch(self, shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> tuple[bytes, list[int]]:
        ranges, places = join_ranges(shards, starts, sizes, _MAX_GAP_BYTES, _MAX_RANGE_BYTES)
        requests = [(str(self._path(shard)), start, stop) for shard, start, stop in ranges]
        parts = read_ranges(requests)
        for (path, start, stop), part in zip(requests, parts, strict=True):
            if len(part) != stop - start:
                raise ValueError(f"{path}: {stop - start} bytes expected at {start}, got {len(part)}")
        return b"".join(parts), places
