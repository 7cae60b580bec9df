"""Matrices in files: a two-dimensional ``.npy`` whose rows are read and written by position.

Nothing is mapped into memory: pages of a map that were touched stay resident, and a pass over a file would look, to whoever
limits this process, as large as the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

_FORMAT = np.lib.format


@dataclass(frozen=True)
class MatrixFile:
    """A complete ``.npy`` file of shape ``[num_rows, dim]``, in C order. Opened anew for every access: may be pickled and shared.

    Attributes:
        path: of the file.
        num_rows: of the matrix.
        dim: its columns.
        dtype: of its numbers.
        offset: bytes before the first row.
    """

    path: Path
    num_rows: int
    dim: int
    dtype: np.dtype
    offset: int

    @classmethod
    def open(cls, path: Path) -> MatrixFile:
        """The matrix in ``path``.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no such matrix, or not all of it; the message does not name the file.
        """
        with open(path, "rb") as file:
            if _FORMAT.read_magic(file) != (1, 0):
                raise ValueError("not a .npy file of version 1.0")
            shape, fortran_order, dtype = _FORMAT.read_array_header_1_0(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
        if len(shape) != 2 or fortran_order or dtype.hasobject:
            raise ValueError(f"not a matrix in C order: shape {list(shape)}, {dtype}")
        expected = offset + shape[0] * shape[1] * dtype.itemsize
        if size != expected:
            raise ValueError(f"{size} bytes where {list(shape)} numbers of {dtype} take {expected}")
        return cls(path, *shape, dtype, offset)

    @classmethod
    def create(cls, path: Path, num_rows: int, dim: int, dtype: np.dtype) -> MatrixFile:
        """A new file with room for such a matrix, to be filled by :meth:`write`; what is not written is zero."""
        with open(path, "xb") as file:
            header = {"descr": _FORMAT.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows, dim)}
            _FORMAT.write_array_header_1_0(file, header)
            offset = file.tell()
            file.truncate(offset + num_rows * dim * dtype.itemsize)
        return cls(path, num_rows, dim, dtype, offset)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dim * self.dtype.itemsize

    def read(self, first: int, stop: int) -> np.ndarray:
        """Rows ``first .. stop - 1``, ``[stop - first, dim]``."""
        out = np.empty((stop - first, self.dim), self.dtype)
        self.read_into(first, out)
        return out

    def read_into(self, first: int, out: np.ndarray) -> None:
        """Rows from ``first`` on into ``out``, contiguous ``[k, dim]`` of this dtype."""
        with open(self.path, "rb", buffering=0) as file:
            self._read(file, first, out)

    def take_into(self, rows: np.ndarray, out: np.ndarray, gap: int, block_rows: int) -> None:
        """The ``rows``, ascending and each once, into ``out``, contiguous ``[k, dim]`` of this dtype.

        Rows no more than ``gap`` apart are read together with what lies between them, at most ``block_rows`` at a time.
        """
        if not len(rows):
            return
        bounds = np.flatnonzero(np.diff(rows) > gap) + 1
        runs = zip([0, *bounds.tolist()], [*bounds.tolist(), len(rows)], strict=True)
        with open(self.path, "rb", buffering=0) as file:
            for begin, end in runs:
                while begin < end:
                    first = int(rows[begin])
                    cut = begin + int(np.searchsorted(rows[begin:end], first + block_rows))
                    count = int(rows[cut - 1]) + 1 - first
                    if count == cut - begin:
                        self._read(file, first, out[begin:cut])
                    else:
                        block = np.empty((count, self.dim), self.dtype)
                        self._read(file, first, block)
                        np.take(block, rows[begin:cut] - first, axis=0, out=out[begin:cut], mode="clip")  # "raise" would copy it twice
                    begin = cut

    def write(self, file: BinaryIO, first: int, rows: np.ndarray) -> None:
        """Write ``rows`` ``[k, dim]``, contiguous, from row ``first`` on; ``file`` is this one, open for writing without a buffer."""
        content = memoryview(rows).cast("B") if rows.size else b""
        position = self.offset + first * self.row_bytes
        while content:
            written = os.pwrite(file.fileno(), content, position)
            content, position = content[written:], position + written

    def _read(self, file: BinaryIO, first: int, out: np.ndarray) -> None:
        assert 0 <= first <= first + len(out) <= self.num_rows and out.dtype == self.dtype and out.flags.c_contiguous
        if not out.size:
            return
        content = memoryview(out).cast("B")
        file.seek(self.offset + first * self.row_bytes)
        while content:
            count = file.readinto(content)  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{self.path} ends before row {first + len(out)}: it was cut short while in use")
            content = content[count:]
