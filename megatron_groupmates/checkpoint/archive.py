"""The zip files that ``torch.save`` writes, mapped into memory: reading a tensor touches only its own bytes."""

from __future__ import annotations

import mmap
import struct
import zipfile
from pathlib import Path

import torch

from megatron_groupmates.config.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class TorchArchive:
    """Records of one file by name (``data.pkl``, ``data/0`` ...), without the folder ``torch.save`` puts around them.

    Raises:
        UserError: when the file is missing, cut short, compressed, or not written by ``torch.save``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                # Private and writable, as torch asks of a buffer; nothing is written, so nothing is copied.
                self._bytes = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
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
