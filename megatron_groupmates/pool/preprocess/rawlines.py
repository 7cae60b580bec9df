"""Lines of plain and compressed files, local or remote, in bounded memory.

Three stages, each a generator: bytes of the file as stored (:class:`StoredBytes`), what they decompress to
(:func:`decompressed`), and lines (:func:`split_lines`). Where a stage cuts its pieces depends on the file alone, so that
a damaged file gives the same lines on every pass.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import zstandard
from isal import igzip_lib

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.storage import is_remote, open_input

logger = logging.getLogger(__name__)

STORED_BLOCK_BYTES = 1 << 18
READ_ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0  # doubled after each attempt

_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError)

# One call of a decompressor loses its output when it meets damage, and has to bound its output. A zstd block of 4 bytes
# can stand for 128 KiB, so 2 KiB give 64 MiB at worst; isal's output is bounded directly.
_ZSTD_PIECE_BYTES = 1 << 11
_GZIP_OUTPUT_BYTES = 1 << 14


class DamagedFileError(Exception):
    """A compressed file ends early or does not decompress from some point on: a property of the data."""


class StoredBytes:
    """Iterating once over it yields a file's bytes as stored, in blocks of ``STORED_BLOCK_BYTES``.

    A read that fails is tried again, ``READ_ATTEMPTS`` times in all with growing pauses, from where it stood.

    Args:
        path: local path or URL.
        num_bytes: size of the file as it was found; a remote file that ends before is a failed read.

    Attributes:
        position: bytes read so far.

    Raises:
        UserError: the URL's protocol is unknown or its package is not installed.
        OSError: the file cannot be read, or a remote file was replaced while it was read; names it.
    """

    def __init__(self, path: str, num_bytes: int) -> None:
        self._path = path
        self._num_bytes = num_bytes
        self._file: BinaryIO | None = None
        self._identity: tuple[Any, ...] | None = None
        self._digest = hashlib.sha256()
        self.position = 0

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of what was read so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        try:
            while block := self._read_block():
                self._digest.update(block)
                self.position += len(block)
                yield block
        finally:
            self._close()

    def _read_block(self) -> bytes:
        attempt = 1
        while True:
            try:
                return self._try_block()
            except UserError:
                raise
            except Exception as error:  # object stores raise exceptions of their own libraries
                self._close()
                reason = f"{type(error).__name__}: {error}"
                if attempt == READ_ATTEMPTS or isinstance(error, _PERMANENT_ERRORS):
                    raise OSError(f"cannot read {self._path} from byte {self.position} on (attempt {attempt}): {reason}") from error
            logger.warning("reading %s failed at byte %d (%s); trying again", self._path, self.position, reason)
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            attempt += 1

    def _try_block(self) -> bytes:
        if self._file is None:
            self._file = open_input(self._path)
            details = getattr(self._file, "details", None) or {}  # of fsspec's remote files
            identity = tuple(details.get(key) for key in ("size", "ETag", "etag"))
            if self._identity not in (None, identity):
                raise OSError(f"it was replaced while it was read: {self._identity} before, {identity} now")
            self._identity = identity
            self._file.seek(self.position)
        parts, size = [], 0
        while size < STORED_BLOCK_BYTES and (part := self._file.read(STORED_BLOCK_BYTES - size)):
            parts.append(part)
            size += len(part)
        if size < STORED_BLOCK_BYTES and self.position + size < self._num_bytes and is_remote(self._path):
            raise OSError(f"the connection ended at byte {self.position + size} of {self._num_bytes}")
        return b"".join(parts)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def decompressed(blocks: Iterable[bytes], path: str) -> Iterator[bytes]:
    """Content of a file, decompressed as the ending of ``path`` says; all members or frames, one after the other.

    Raises:
        DamagedFileError: it ends early, or is damaged from here on.
    """
    if path.endswith(".gz"):
        return _gunzipped(blocks)
    return _unzstded(blocks) if path.endswith((".zst", ".zstd")) else iter(blocks)


def _gunzipped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    member = None
    for block in blocks:
        while block:
            if member is None:
                block = block.lstrip(b"\0")  # as gzip's own reader: members may be padded with zeros
                if not block:
                    break
                member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            try:
                content = member.decompress(block, _GZIP_OUTPUT_BYTES)
                while content:
                    yield content
                    content = b"" if member.eof else member.decompress(b"", _GZIP_OUTPUT_BYTES)
            except igzip_lib.IsalError as error:
                raise DamagedFileError(f"gzip: {error}") from error
            block = b""
            if member.eof:
                block, member = member.unused_data, None
    if member is not None:
        raise DamagedFileError("the file ends within a gzip member")


def _unzstded(blocks: Iterable[bytes]) -> Iterator[bytes]:
    # The library's own reader passes over a file that ends within a frame.
    frame = None
    for block in blocks:
        for start in range(0, len(block), _ZSTD_PIECE_BYTES):
            piece = block[start : start + _ZSTD_PIECE_BYTES]
            while piece:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    content = frame.decompress(piece)
                except zstandard.ZstdError as error:
                    raise DamagedFileError(str(error)) from error
                if content:
                    yield content
                piece = b""
                if frame.eof:
                    piece, frame = frame.unused_data, None
    if frame is not None:
        raise DamagedFileError("the file ends within a zstd frame")


def split_lines(pieces: Iterable[bytes], max_line_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Lines without their newline, and their size in bytes with it.

    A line of more than ``max_line_bytes`` is never held: its content is empty, its size the real one. A last line
    without newline counts, unless ``pieces`` raises: then it is part of what is lost.
    """
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        first, *rest = piece.split(b"\n")
        size += len(first)
        if size <= max_line_bytes:
            held.append(first)
        else:
            held = []
        if not rest:
            continue
        yield b"".join(held) if size < max_line_bytes else b"", size + 1
        *whole, last = rest
        for line in whole:
            yield line if len(line) < max_line_bytes else b"", len(line) + 1
        held, size = [last] if len(last) <= max_line_bytes else [], len(last)
    if size:
        yield b"".join(held) if size <= max_line_bytes else b"", size
