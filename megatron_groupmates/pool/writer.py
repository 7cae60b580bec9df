"""Writing token shards: tars with one member per sample, byte-identical for identical samples.

The bytes of ``raw`` members depend on the ids alone, those of ``json.gz`` members also on the version of zlib.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_groupmates.pool.index import MEMBER_FORMATS, ShardRecord
from megatron_groupmates.utils.files import atomic_file

_GZIP_LEVEL = 4  # ids hardly compress: four per cent larger than with the default, in a sixth of the time
_SUFFIX = {"raw": "bin", "json.gz": "json.gz"}


def shard_name(number: int) -> str:
    """Name of shard ``number``, as in DCLM's tokenised data."""
    return f"shard_{number:08d}"


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype for ids below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_member(tokens: np.ndarray, dtype: str, member_format: str) -> bytes:
    """The bytes of one sample: little-endian ids, or the gzip of a JSON list (no time stamp)."""
    assert member_format in MEMBER_FORMATS, member_format
    if member_format == "raw":
        return tokens.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes()
    return gzip.compress(json.dumps(tokens.tolist()).encode(), _GZIP_LEVEL, mtime=0)


_NAME, _CHECKSUM = slice(0, 100), slice(148, 156)  # fields of a tar header


@functools.lru_cache(maxsize=1024)
def _nameless_header(size: int) -> tuple[bytes, bytes, int]:
    """What stands between name and checksum of a header, what stands after them, and the checksum without the name."""
    info = tarfile.TarInfo("")
    info.size, info.mode, info.mtime = size, 0o644, 0
    header = info.tobuf(tarfile.GNU_FORMAT)
    before, after = header[_NAME.stop : _CHECKSUM.start], header[_CHECKSUM.stop :]
    return before, after, sum(before) + sum(after) + 8 * ord(" ")


def _header(name: str, size: int) -> bytes:
    """GNU header of a regular file. Python's own takes longer than everything else that is done to a sample here."""
    encoded = name.encode()
    before, after, checksum = _nameless_header(size)
    return b"%b%b%06o\0 %b" % (encoded.ljust(_NAME.stop, b"\0"), before, checksum + sum(encoded), after)


def write_shard(directory: Path | str, number: int, samples: Iterable[np.ndarray], dtype: str, member_format: str = "raw") -> ShardRecord:
    """Write ``shard_<number>.tar`` into ``directory``; it is complete or absent.

    Members are ``{number:08}_{row:08}.bin`` (or ``.json.gz``), with GNU headers, mode 0644, time 0.

    Args:
        directory: where the shard goes.
        number: of the shard.
        samples: integer arrays [length], one per row.
        dtype: ``uint16`` or ``uint32``, of raw members.
        member_format: ``raw`` or ``json.gz``.

    Returns:
        The shard's record for the index.

    Raises:
        OSError: it cannot be written.
    """
    offsets, member_bytes, lengths = [], [], []
    digest, position = hashlib.sha256(), 0
    with atomic_file(Path(directory) / f"{shard_name(number)}.tar") as file:

        def write(content: bytes) -> None:
            nonlocal position
            file.write(content)
            digest.update(content)
            position += len(content)

        for row, tokens in enumerate(samples):
            content = encode_member(tokens, dtype, member_format)
            write(_header(f"{number:08d}_{row:08d}.{_SUFFIX[member_format]}", len(content)))
            offsets.append(position)
            member_bytes.append(len(content))
            lengths.append(len(tokens))
            write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        end = position + 2 * tarfile.BLOCKSIZE
        write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
    return ShardRecord(
        name=shard_name(number),
        offsets=np.array(offsets, dtype=np.uint64),
        member_bytes=np.array(member_bytes, dtype=np.uint32),
        lengths=np.array(lengths, dtype=np.int32),
        num_bytes=position,
        sha256=digest.hexdigest(),
    )
