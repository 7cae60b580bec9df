"""Shards: tars as Python's own module writes them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.pool.writer import _header, encode_member, write_shard


@pytest.mark.parametrize("size", [0, 1, 511, 4098, 0o77777777777])
@pytest.mark.parametrize("name", ["00000000_00000000.bin", "12345678_99999999.json.gz", "x" * 99])
def test_headers_are_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    assert _header(name, size) == info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
def test_tarfile_reads_what_is_recorded(tmp_path: Path, member_format: str) -> None:
    samples = [np.arange(length, dtype=np.uint16) for length in (3, 700, 1)]
    record = write_shard(tmp_path, 5, samples, "uint16", member_format)
    with tarfile.open(tmp_path / "shard_00000005.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [
            f"00000005_{row:08d}.{'bin' if member_format == 'raw' else member_format}" for row in range(3)
        ]
        assert [member.offset_data for member in members] == record.offsets.tolist()
        assert [member.size for member in members] == record.member_bytes.tolist()
        contents = [tar.extractfile(member).read() for member in members]
    assert contents == [encode_member(tokens, "uint16", member_format) for tokens in samples]
    assert record.num_bytes == (tmp_path / "shard_00000005.tar").stat().st_size
