"""Bytes as stored, decompressed, in lines."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess import rawlines
from megatron_groupmates.pool.preprocess.rawlines import DamagedFileError, StoredBytes, decompressed, split_lines

CONTENT = b"".join(b"line %d %s\n" % (number, random.Random(number).randbytes(30).hex().encode()) for number in range(5000))


def cut(content: bytes, size: int = 1000) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


@given(content=st.binary().map(lambda content: content.replace(b"a", b"\n")), size=st.integers(1, 9), limit=st.integers(2, 12))
@settings(deadline=None)
def test_split_lines_as_readline(content: bytes, size: int, limit: int) -> None:
    expected = [(line.removesuffix(b"\n") if len(line) <= limit else b"", len(line)) for line in io.BytesIO(content)]
    assert list(split_lines(cut(content, size), limit)) == expected


def test_a_long_line_is_never_held() -> None:
    """Two gigabytes in one line take no more memory than its pieces."""
    pieces = itertools.chain(itertools.repeat(b"x" * (1 << 20), 2048), [b"\nok\n"])
    assert list(split_lines(pieces, 1 << 20)) == [(b"", (1 << 31) + 1), (b"ok", 3)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_content_that_expands_comes_in_bounded_pieces(ending: str) -> None:
    content = bytes(1 << 28)
    stored = gzip.compress(content, 1) if ending == ".gz" else zstandard.compress(content)
    sizes = [len(piece) for piece in decompressed(cut(stored, 1 << 18), ending)]
    assert sum(sizes) == 1 << 28
    assert max(sizes) <= 1 << 26


def members(ending: str, *contents: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return b"".join(map(gzip.compress if ending == ".gz" else compressor.compress, contents))


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_several_members_and_frames(size: int) -> None:
    parts = (b"", CONTENT[:500], b"", CONTENT[500:900])
    for ending in (".gz", ".zst", ".zstd"):
        assert b"".join(decompressed(cut(members(ending, *parts), size), ending)) == CONTENT[:900]
    padded = gzip.compress(b"a") + bytes(9) + gzip.compress(b"b") + bytes(2000)
    assert b"".join(decompressed(cut(padded, size), ".gz")) == b"ab"
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert b"".join(decompressed(cut(skippable + members(".zst", b"a") + skippable, size), ".zst")) == b"a"


def until_damage(stored: bytes, ending: str) -> bytes:
    """What comes before the damage; fails where there is none."""
    pieces = []
    with pytest.raises(DamagedFileError):
        for piece in decompressed(cut(stored), ending):
            pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_everything_before_the_damage_is_used(ending: str) -> None:
    stored = members(ending, CONTENT)
    for stop in (1, 5, len(stored) // 2, len(stored) - 1):
        content = until_damage(stored[:stop], ending)
        assert CONTENT.startswith(content)
        reference = zlib.decompressobj(wbits=31) if ending == ".gz" else zstandard.ZstdDecompressor().decompressobj()
        assert len(reference.decompress(stored[:stop])) - len(content) <= 258  # the longest match of deflate
    assert until_damage(stored + b"garbage" * 30, ending) == CONTENT
    assert until_damage(stored + members(ending, CONTENT)[:-9], ending).startswith(CONTENT)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_garbage_in_the_middle(ending: str) -> None:
    stored = members(ending, CONTENT, CONTENT)
    for start in range(len(stored) // 3, len(stored) - 100, len(stored) // 7):
        content = until_damage(stored[:start] + b"\xff" * 64 + stored[start + 64 :], ending)
        intact = until_damage(stored[:start], ending)
        assert content.startswith(intact[: -(1 << 14 if ending == ".gz" else 1 << 17)])


def test_a_wrong_checksum_is_damage() -> None:
    stored = bytearray(gzip.compress(CONTENT))
    stored[-6] ^= 1
    with pytest.raises(DamagedFileError, match=r"gzip: .*checksum"):
        list(decompressed([bytes(stored)], ".gz"))


class Flaky(io.BytesIO):
    """A remote file of which each fourth read fails, all opened ones counted together; ``details`` as fsspec has them."""

    reads = 0

    def __init__(self, content: bytes, tag: str = "x", fails: bool = True) -> None:
        super().__init__(content)
        self.fails = fails
        self.details = {"size": len(content), "ETag": tag}

    def read(self, size: int | None = -1) -> bytes:
        Flaky.reads += 1
        if self.fails and Flaky.reads % 4 == 0:
            raise ConnectionResetError("reset by peer")
        return super().read(min(size or 0, 4000))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []
    monkeypatch.setattr(rawlines.time, "sleep", seen.append)
    monkeypatch.setattr(rawlines, "STORED_BLOCK_BYTES", 6000)
    return seen


def test_failed_reads_are_tried_again(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    monkeypatch.setattr(rawlines, "open_input", lambda path: Flaky(CONTENT))
    stored = StoredBytes("s3://bucket/a.jsonl", len(CONTENT))
    assert b"".join(stored) == CONTENT
    assert stored.position == len(CONTENT)
    assert pauses and set(pauses) == {1.0}


@pytest.mark.parametrize(
    ("opened", "message", "num_pauses"),
    [
        (lambda: Flaky(CONTENT[:-1], fails=False), r"the connection ended at byte \d+ of \d+", 4),
        (lambda: Flaky(CONTENT, tag=str(Flaky.reads)), r"it was replaced while it was read", 4),
        (lambda: (_ for _ in ()).throw(RuntimeError("no such host")), r"from byte 0 on \(attempt 5\): RuntimeError: no such host", 4),
        (lambda: (_ for _ in ()).throw(PermissionError("not yours")), r"\(attempt 1\): PermissionError: not yours", 0),
    ],
)
def test_reads_that_keep_failing(monkeypatch: pytest.MonkeyPatch, pauses: list[float], opened: Any, message: str, num_pauses: int) -> None:
    monkeypatch.setattr(rawlines, "open_input", lambda path: opened())
    with pytest.raises(OSError, match=rf"cannot read s3://bucket/a.jsonl .*{message}"):
        list(StoredBytes("s3://bucket/a.jsonl", len(CONTENT)))
    assert pauses[len(pauses) - num_pauses :] == [1.0, 2.0, 4.0, 8.0][:num_pauses]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot read .*/none from byte 0 on \(attempt 1\): FileNotFoundError"):
        list(StoredBytes(str(tmp_path / "none"), 0))
    with pytest.raises(UserError, match="cannot open nonsense://a"):
        list(StoredBytes("nonsense://a", 0))
