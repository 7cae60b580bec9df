"""Spools: the samples of one input file, sorted by cell, between the two passes of a build.

A spool is a sequence of blocks of bounded size and a table. A block holds consecutive samples of the file, its *slices*:
the samples of each cell one after the other, in their order in the file. A slice is

- for each sample three little-endian int32: tokens, bytes of its source line, and kind (as the file numbers its kinds);
- the ids of all its samples;
- the source lines of all its samples.

The table, at the end, has for each block and cell two int64: where the slice begins and how many samples it has; after
each block's last cell comes one more entry, where the block ends.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

_SAMPLE = np.dtype([("length", "<i4"), ("source_bytes", "<i4"), ("kind", "<i4")])
_SLICE = np.dtype([("start", "<i8"), ("samples", "<i8")])
_BYTES_PER_SAMPLE = 512  # what the objects of a sample that waits in memory take beside its content, roughly


@dataclasses.dataclass(frozen=True)
class Spool:
    """A finished spool.

    Attributes:
        path: of the file.
        num_blocks: blocks in it.
        table_start: where its table begins.
    """

    path: Path
    num_blocks: int
    table_start: int

    def samples_per_cell(self, num_cells: int) -> np.ndarray:
        """int64[num_cells].

        Raises:
            OSError: it cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.table_start)
            table = np.frombuffer(file.read(), dtype=_SLICE).reshape(self.num_blocks, num_cells + 1)
        return table["samples"][:, :num_cells].sum(axis=0)


class SpoolWriter:
    """Takes the samples of a file in order and writes its spool.

    Args:
        file: to write to, empty.
        num_cells: of the build.
        block_bytes: memory that the samples of a block may take; a block is written when they take as much. The content
            of a cell, over all blocks, does not depend on it.
    """

    def __init__(self, file: BinaryIO, num_cells: int, block_bytes: int) -> None:
        self._file = file
        self._num_cells = num_cells
        self._block_bytes = block_bytes
        self._position = 0
        self._tables: list[np.ndarray] = []
        self._clear()

    def _clear(self) -> None:
        self._ids: list[memoryview] = []
        self._sources: list[bytes] = []
        self._cells: list[np.ndarray] = []
        self._kinds: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._num_bytes = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, cells: np.ndarray, kinds: np.ndarray, sources: list[bytes]) -> None:
        """Take consecutive samples.

        Args:
            tokens: ids of all of them one after the other, little-endian.
            lengths: int[n].
            cells: int[n].
            kinds: int[n], -1 where unknown.
            sources: source line of each, without newline.
        """
        ids = memoryview(np.ascontiguousarray(tokens)).cast("B")
        stops = (np.cumsum(lengths, dtype=np.int64) * tokens.itemsize).tolist()
        self._ids += [ids[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
        self._sources += sources
        self._cells.append(cells)
        self._kinds.append(kinds)
        self._lengths.append(lengths)
        self._num_bytes += len(ids) + sum(map(len, sources)) + _BYTES_PER_SAMPLE * len(sources)
        if self._num_bytes >= self._block_bytes:
            self._write_block()

    def finish(self) -> tuple[int, int]:
        """Write what is left. Returns (blocks, where the table begins)."""
        if self._ids:
            self._write_block()
        for table in self._tables:
            self._file.write(table.tobytes())
        return len(self._tables), self._position

    def _write_block(self) -> None:
        cells = np.concatenate(self._cells)
        order = np.argsort(cells, kind="stable")
        header = np.empty(len(order), dtype=_SAMPLE)
        header["length"] = np.concatenate(self._lengths)[order]
        header["source_bytes"] = np.fromiter(map(len, self._sources), dtype=np.int32, count=len(order))[order]
        header["kind"] = np.concatenate(self._kinds)[order]
        table = np.zeros(self._num_cells + 1, dtype=_SLICE)
        table["samples"][:-1] = np.bincount(cells, minlength=self._num_cells)
        stops = np.cumsum(table["samples"])
        sizes = np.zeros(self._num_cells, dtype=np.int64)
        for cell in np.flatnonzero(table["samples"]).tolist():
            stop = int(stops[cell])
            chosen = range(stop - int(table["samples"][cell]), stop)
            samples = order[chosen.start : stop].tolist()
            content = [header[chosen.start : stop].tobytes(), *(self._ids[sample] for sample in samples)]
            content += [self._sources[sample] for sample in samples]
            sizes[cell] = self._file.write(b"".join(content))
        table["start"][1:] = np.cumsum(sizes)
        table["start"] += self._position
        self._position = int(table["start"][-1])
        self._tables.append(table)
        self._clear()


class CellReader:
    """The samples of one cell, numbered by file (in the order of ``spools``), then by number in the file.

    Args:
        spools: of all input files but duplicates.
        cell: which.
        num_cells: of the build.
        dtype: of the ids.
        memory_bytes: how much of the cell may be kept in memory; samples beyond are read when they are asked for.

    Attributes:
        spool_of: int64[samples], number of the spool in ``spools``.
        kinds: int32[samples], as the file numbers them.

    Raises:
        OSError: a spool cannot be read.
    """

    def __init__(self, spools: Sequence[Spool], cell: int, num_cells: int, dtype: str, memory_bytes: int) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._paths: list[Path] = []
        self._slices: list[bytes | None] = []
        self._slice_starts: list[int] = []
        headers, self._memory_left = [], memory_bytes
        owners: list[int] = []
        for number, spool in enumerate(spools):
            with open(spool.path, "rb", buffering=0) as file:
                for block in range(spool.num_blocks):
                    place = spool.table_start + (block * (num_cells + 1) + cell) * _SLICE.itemsize
                    here, after = np.frombuffer(_read(file.fileno(), 2 * _SLICE.itemsize, place, spool.path), dtype=_SLICE)
                    if here["samples"]:
                        owners.append(number)
                        headers.append(
                            self._open_slice(file.fileno(), spool.path, int(here["start"]), int(after["start"]), here["samples"])
                        )
        samples = np.concatenate(headers) if headers else np.empty(0, dtype=_SAMPLE)
        counts = np.array([len(header) for header in headers], dtype=np.int64)
        self._slice_of = np.repeat(np.arange(len(headers)), counts)
        self.spool_of = np.repeat(np.array(owners, dtype=np.int64), counts)
        self.kinds = samples["kind"]
        self._id_bytes = samples["length"].astype(np.int64) * self._dtype.itemsize
        self._source_bytes = samples["source_bytes"].astype(np.int64)
        self._locate(counts)

    def _open_slice(self, descriptor: int, path: Path, start: int, stop: int, num_samples: int) -> np.ndarray:
        """Header of a slice; the slice itself is kept where memory allows."""
        size = stop - start
        whole = size <= self._memory_left
        content = _read(descriptor, size if whole else num_samples * _SAMPLE.itemsize, start, path)
        self._memory_left -= size if whole else 0
        self._paths.append(path)
        self._slices.append(content if whole else None)
        self._slice_starts.append(start)
        return np.frombuffer(content, dtype=_SAMPLE, count=num_samples)

    def _locate(self, counts: np.ndarray) -> None:
        """Find where, in its slice, each sample's ids and source line begin."""
        first = np.cumsum(counts) - counts
        ids_before = np.cumsum(self._id_bytes) - self._id_bytes
        sources_before = np.cumsum(self._source_bytes) - self._source_bytes
        ids_of_slice = np.add.reduceat(self._id_bytes, first) if len(counts) else counts
        header_bytes = np.repeat(counts * _SAMPLE.itemsize, counts)
        self._id_starts = header_bytes + ids_before - np.repeat(ids_before[first], counts)
        self._source_starts = header_bytes + np.repeat(ids_of_slice, counts) + sources_before - np.repeat(sources_before[first], counts)

    def __len__(self) -> int:
        return len(self.kinds)

    def read(self, sample: int) -> tuple[np.ndarray, bytes]:
        """(ids [length], source line) of a sample.

        Raises:
            OSError: it is not in memory, and its spool cannot be read.
        """
        places = ((self._id_starts[sample], self._id_bytes[sample]), (self._source_starts[sample], self._source_bytes[sample]))
        number = int(self._slice_of[sample])
        content = self._slices[number]
        if content is None:
            path, start = self._paths[number], self._slice_starts[number]
            with open(path, "rb", buffering=0) as file:
                ids, source = (_read(file.fileno(), int(size), start + int(place), path) for place, size in places)
            return np.frombuffer(ids, dtype=self._dtype), source
        (id_start, id_bytes), (source_start, source_bytes) = places
        ids = np.frombuffer(content, dtype=self._dtype, count=id_bytes // self._dtype.itemsize, offset=id_start)
        return ids, content[source_start : source_start + source_bytes]


def _read(descriptor: int, size: int, position: int, path: Path) -> bytes:
    """``size`` bytes at ``position``: a read of a network file system may give fewer at a time."""
    parts = []
    while size:
        part = os.pread(descriptor, size, position)
        if not part:
            raise OSError(f"{path} ends before byte {position + size}: it was damaged after it was written")
        parts.append(part)
        size, position = size - len(part), position + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
