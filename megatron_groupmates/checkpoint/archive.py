"""The zip files that ``torch.save`` writes, mapped into memory: reading a tensor touches only its own bytes."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path

import torch

from megatron_groupmates.config.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class PlainPickle:
    """A pickle that no zip file holds, such as the ``.metadata`` of torch's distributed checkpoints.

    Raises:
        UserError: when the file is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        except FileNotFoundError:
            raise UserError(f"checkpoint file {path} does not exist") from None
        except ValueError:
            raise UserError(f"{path} is empty: its writer was stopped or is not done; wait, or use an earlier checkpoint") from None

    def record(self, name: str) -> torch.Tensor:
        """The pickle's bytes, the one record ``data.pkl`` that there is.

        Raises:
            UserError: for another name.
        """
        if name != "data.pkl":
            raise UserError(f"{self.path} is damaged: it refers to a record '{name}' that such a file cannot have")
        return self._bytes


class TorchArchive:
    """Records of one file by name (``data.pkl``, ``data/0`` ...), without the folder ``torch.save`` puts around them.

    Args:
        path: the file.
        offset: where in it the zip file begins, in bytes.
        length: bytes of the zip file; None for all of the file.

    Raises:
        UserError: when the file is missing, cut short, compressed, or not written by ``torch.save``.
    """

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                stop = path.stat().st_size if length is None else offset + length
                with zipfile.ZipFile(_Window(file, offset, stop)) as archive:
                    entries = archive.infolist()
                # Private and writable, as torch asks of a buffer; nothing is written, so nothing is copied.
                whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
                self._bytes = whole[offset:stop]
        except FileNotFoundError:
            raise UserError(f"checkpoint file {path} does not exist") from None
        except zipfile.BadZipFile:
            raise UserError(self._not_a_zip()) from None
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "data.pkl" not in self._entries:
            raise UserError(f"{path} is a zip file, but not one that torch.save wrote: it has no record 'data.pkl'")
        if "byteorder" in self._entries and bytes(self.record("byteorder").numpy()) != b"little":
            raise UserError(f"{path} was written on a big-endian machine; only little-endian checkpoints can be read")

    def record(self, name: str) -> torch.Tensor:
        """The record's bytes, a uint8 view of the mapped file.

        Raises:
            UserError: when there is no such record or the file ends before it does.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise UserError(f"{self.path} is damaged: it has no record '{name}'")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path} was compressed after it was saved (record '{name}'); restore the original file")
        header = bytes(self._bytes[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size].numpy())
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise UserError(f"{self.path} is damaged: record '{name}' is not where the file's directory says")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + entry.file_size > self._bytes.numel():
            raise UserError(
                f"{self.path} is damaged: record '{name}' ends at byte {start + entry.file_size}, the file at {self._bytes.numel()}"
            )
        return self._bytes[start : start + entry.file_size]

    def _not_a_zip(self) -> str:
        with open(self.path, "rb") as file:
            first = file.read(4)
        size = self.path.stat().st_size
        if size == 0 or first == b"PK\x03\x04":
            return f"{self.path} is cut short ({size} bytes): its writer was stopped or is not done; wait, or use an earlier checkpoint"
        return (
            f"{self.path} is not a zip file of torch.save; DeepSpeed writes one unless 'checkpoint_serialization' "
            "is switched off in its configuration"
        )


class _Window(io.RawIOBase):
    """Bytes ``start`` to ``stop - 1`` of a file, for reading, as a file of their own."""

    def __init__(self, file: io.BufferedReader, start: int, stop: int) -> None:
        self._file, self._start, self._stop = file, start, min(stop, file.seek(0, io.SEEK_END))
        self._place = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._stop - self._start}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._stop - self._start - self._place)
        self._file.seek(self._start + self._place)
        found = self._file.read(left if size is None or size < 0 else min(size, left))
        self._place += len(found)
        return found
