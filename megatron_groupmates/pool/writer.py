"""Writing token shards: tars with one member per sample, byte-identical for identical samples."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_groupmates.pool.index import MEMBER_FORMATS, ShardRecord
from megatron_groupmates.utils.files import atomic_file

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
    return gzip.compress(json.dumps(tokens.tolist()).encode(), mtime=0)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.GNU_FORMAT)


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
