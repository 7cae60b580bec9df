"""Second pass of a build: the shards that begin in a cell, from the spools of all input files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_groupmates.pool.index import ShardRecord
from megatron_groupmates.pool.preprocess.plan import order_in_cell, shards_of_cell
from megatron_groupmates.pool.preprocess.spool import CellReader, Spool
from megatron_groupmates.pool.preprocess.work import WorkDirectory
from megatron_groupmates.pool.sources import sources_path, write_source_lines
from megatron_groupmates.pool.writer import shard_name, write_shard
from megatron_groupmates.utils.files import write_bytes
from megatron_groupmates.utils.storage import is_remote, join, upload

_SAMPLE = np.dtype([("offset", "<u8"), ("member_bytes", "<u4"), ("length", "<i4"), ("file", "<i4"), ("kind", "<i4")])


@dataclasses.dataclass(frozen=True)
class StoredShard:
    """What the work directory keeps of a finished shard.

    Attributes:
        record: for the index.
        files: int32[rows], number of the input file of each sample.
        kinds: int32[rows], kind of each sample as its file numbers them, -1 where unknown.
    """

    record: ShardRecord
    files: np.ndarray
    kinds: np.ndarray

    def write(self, path: Path) -> None:
        """Write it as a line of JSON and a table."""
        table = np.empty(len(self.files), dtype=_SAMPLE)
        record = self.record
        table["offset"], table["member_bytes"], table["length"] = record.offsets, record.member_bytes, record.lengths
        table["file"], table["kind"] = self.files, self.kinds
        head = {"name": record.name, "num_bytes": record.num_bytes, "sha256": record.sha256}
        write_bytes(path, json.dumps(head).encode() + b"\n" + table.tobytes())

    @classmethod
    def read(cls, path: Path) -> StoredShard:
        """What :meth:`write` wrote."""
        head, _, content = path.read_bytes().partition(b"\n")
        table = np.frombuffer(content, dtype=_SAMPLE)
        record = ShardRecord(offsets=table["offset"], member_bytes=table["member_bytes"], lengths=table["length"], **json.loads(head))
        return cls(record, table["file"], table["kind"])


class Destination:
    """Where the files of the pool go: written into ``directory``, then published.

    Args:
        output: directory or URL of the pool.
        work: of the build; files on their way to a remote output lie there.

    Attributes:
        directory: local directory in which files of the pool are written.
    """

    def __init__(self, output: str, work: WorkDirectory) -> None:
        self._output = output
        self._remote = is_remote(output)
        self.directory = work.pool if self._remote else Path(output.removeprefix("file://"))

    def publish(self, *names: str) -> None:
        """Bring complete files to their place, one after the other.

        Raises:
            OSError: a remote output does not take them.
        """
        if self._remote:
            for name in names:
                upload(self.directory / name, join(self._output, name))
                (self.directory / name).unlink()


@dataclasses.dataclass(frozen=True)
class GatherContext:
    """What every cell of the second pass needs.

    Attributes:
        work: of the build.
        destination: of the shards.
        file_numbers: numbers of the input files that are not duplicates.
        spools: theirs.
        starts: int64[cells + 1], position of each cell's first sample in the pool.
        seed: of the shuffle.
        samples_per_shard: of all shards but the last.
        dtype: of the ids.
        member_format: of the shards.
        memory_bytes: how much of a cell may be kept in memory.
    """

    work: WorkDirectory
    destination: Destination
    file_numbers: np.ndarray
    spools: tuple[Spool, ...]
    starts: np.ndarray
    seed: int
    samples_per_shard: int
    dtype: str
    member_format: str
    memory_bytes: int


def gather_cell(context: GatherContext, cell: int, advance: Callable[[int], None]) -> None:
    """Write the shards that begin in ``cell`` and are not finished, each with its sources and, last, its record.

    Raises:
        OSError: a spool cannot be read or the results cannot be written.
    """
    shards = shards_of_cell(context.starts, cell, context.samples_per_shard)
    unfinished = [shard for shard in shards if not context.work.record_path(shard).exists()]
    if not unfinished:
        return
    end = min(shards.stop * context.samples_per_shard, int(context.starts[-1]))
    cells = _Cells(context, end)
    for shard in unfinished:
        first = shard * context.samples_per_shard
        stop = min(first + context.samples_per_shard, end)
        rows = _Rows()
        name = shard_name(shard)
        tokens = rows.tell(cells.samples(first, stop))
        record = write_shard(context.destination.directory, shard, tokens, context.dtype, context.member_format)
        write_source_lines(context.destination.directory, name, rows.sources)
        context.destination.publish(f"{name}.tar", sources_path(Path(), name).name)
        stored = StoredShard(record, np.array(rows.files, dtype=np.int32), np.array(rows.kinds, dtype=np.int32))
        stored.write(context.work.record_path(shard))
        advance(stop - first)


class _Rows:
    """Keeps what the shard itself does not take of the samples that pass by."""

    def __init__(self) -> None:
        self.sources: list[bytes] = []
        self.files: list[int] = []
        self.kinds: list[int] = []

    def tell(self, samples: Iterator[tuple[np.ndarray, bytes, int, int]]) -> Iterator[np.ndarray]:
        for tokens, source, file, kind in samples:
            self.sources.append(source)
            self.files.append(file)
            self.kinds.append(kind)
            yield tokens


class _Cells:
    """Samples by their position in the pool, asked for in order and up to ``end``."""

    def __init__(self, context: GatherContext, end: int) -> None:
        self._context = context
        self._end = end
        self._cell = -1
        self._reader: CellReader | None = None
        self._order = np.empty(0, dtype=np.int64)

    def samples(self, first: int, stop: int) -> Iterator[tuple[np.ndarray, bytes, int, int]]:
        """(ids, source line, number of the input file, kind) of the samples at positions ``first`` to ``stop``."""
        starts, position = self._context.starts, first
        while position < stop:
            cell = int(np.searchsorted(starts, position, side="right")) - 1
            self._open(cell)
            assert self._reader is not None
            place, end = position - int(starts[cell]), min(stop, int(starts[cell + 1])) - int(starts[cell])
            for sample in self._order[place:end].tolist():
                file = int(self._context.file_numbers[self._reader.spool_of[sample]])
                yield *self._reader.read(sample), file, int(self._reader.kinds[sample])
            position = end + int(starts[cell])

    def _open(self, cell: int) -> None:
        if cell == self._cell:
            return
        context = self._context
        self._reader = None  # its memory is needed for the next
        first, stop = int(context.starts[cell]), int(context.starts[cell + 1])
        num_needed = min(stop, self._end) - first
        # Of the last cell often a few samples only: they are read one by one.
        memory = context.memory_bytes if 2 * num_needed >= stop - first else 0
        self._reader = CellReader(context.spools, cell, len(context.starts) - 1, context.dtype, memory)
        assert len(self._reader) == stop - first, f"cell {cell} has {len(self._reader)} samples, {stop - first} were counted"
        self._order = order_in_cell(context.seed, cell, np.arange(num_needed), stop - first)
        self._cell = cell
