"""Files of the chunks that oracle workers share: which of them can be used, and how one is written."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_groupmates.selection.store import EmbeddingStore, Part, part_ranges, remove_part, write_part
from megatron_groupmates.server.context import Arrays
from megatron_groupmates.utils.files import atomic_file

logger = logging.getLogger(__name__)

Range = tuple[int, int]
"""First item, and one past the last."""

_NAME = re.compile(r"chunk-(\d+)-(\d+)\.npz")


class ChunkFiles(Protocol):
    """Where the chunks of one piece of work are kept. A file's name says which items it holds."""

    def kept(self, total: int) -> list[Range]:
        """Chunks of ``total`` items that can be used: disjoint, in order. Called on the main rank while nobody writes."""
        ...

    def write(self, first: int, stop: int, arrays: Arrays) -> None:
        """Keep what was computed of the items ``first .. stop - 1``, as a whole or not at all."""
        ...

    def collect(self, total: int) -> Arrays:
        """What the stage keeps when all ``total`` items are there."""
        ...


class ArrayFiles:
    """Chunks in ``.npz`` files, joined in memory."""

    def __init__(self, directory: Path, ragged: Collection[str] = ()) -> None:
        """Arrays named in ``ragged`` have not one row for each item but as many as ``count`` int64, one of the arrays, says."""
        self._directory, self._ragged = directory, ragged

    def kept(self, total: int) -> list[Range]:
        """See :class:`ChunkFiles`."""
        return disjoint([part for part, _ in self._chunks(total)])

    def write(self, first: int, stop: int, arrays: Arrays) -> None:
        """See :class:`ChunkFiles`."""
        with atomic_file(self._directory / f"chunk-{first:012d}-{stop:012d}.npz") as file:
            np.savez(file, **arrays)

    def collect(self, total: int) -> Arrays:
        """All items in order."""
        chunks = dict(self._chunks(total))
        kept = disjoint(chunks)
        assert covers(kept, total), f"{self._directory} lacks chunks"
        return {key: np.concatenate([chunks[part][key] for part in kept]) for key in chunks[kept[0]]}

    def _chunks(self, total: int) -> Iterator[tuple[Range, Arrays]]:
        """Range and arrays of every chunk that can be used."""
        for path in sorted(self._directory.glob("chunk-*.npz")):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            first, stop = int(match[1]), int(match[2])
            if first < stop <= total and (arrays := self._read(path, stop - first)) is not None:
                yield (first, stop), arrays

    def _read(self, path: Path, count: int) -> Arrays | None:
        """The arrays of a chunk of ``count`` items; None, with a warning, when the file is damaged or not of that many."""
        try:
            with np.load(path) as content:
                arrays = {key: content[key] for key in content.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s); it is computed again", path, error)
            return None
        expected = {name: int(arrays["count"].sum()) if name in self._ragged and "count" in arrays else count for name in arrays}
        if not arrays or any(array.ndim == 0 or len(array) != expected[name] for name, array in arrays.items()):
            logger.warning("%s does not hold the %d items that its name says; it is computed again", path, count)
            return None
        return arrays


class PartFiles:
    """Chunks of ``embeddings`` and ``individual`` as the parts of an :class:`EmbeddingStore`: never all in memory, never joined."""

    def __init__(self, directory: Path) -> None:
        """Of the store in ``directory``."""
        self._directory = directory

    def kept(self, total: int) -> list[Range]:
        """See :class:`ChunkFiles`. What cannot be used is deleted: a store has no parts but its own."""
        kept: list[Range] = []
        for first, stop in part_ranges(self._directory):
            if problem := self._problem(kept, first, stop, total):
                logger.warning("%s; it is computed again", problem)
                remove_part(self._directory, first, stop)
            else:
                kept.append((first, stop))
        return kept

    def write(self, first: int, stop: int, arrays: Arrays) -> None:
        """See :class:`ChunkFiles`."""
        assert len(arrays["embeddings"]) == stop - first
        write_part(self._directory, first, arrays["embeddings"], arrays["individual"])

    def collect(self, total: int) -> Arrays:
        """Rows and numbers of an embedding in the finished store, which is read where it lies."""
        store = EmbeddingStore.open(self._directory, total)
        return {"num_rows": np.array(store.num_rows), "dim": np.array(store.dim)}

    def _problem(self, kept: list[Range], first: int, stop: int, total: int) -> str | None:
        """Why the part of these rows is of no use beside those ``kept``, or None."""
        if not first < stop <= total:
            return f"{self._directory} holds a part of rows {first} to {stop - 1} of {total}"
        if kept and first < kept[-1][1]:
            return f"{self._directory} holds row {first} twice"
        try:
            Part.open(self._directory, first, stop)
        except ValueError as error:
            return str(error)
        return None


def disjoint(ranges: Iterable[Range]) -> list[Range]:
    """``ranges`` in order, without those that begin before the one kept before them ends."""
    kept: list[Range] = []
    for first, stop in sorted(ranges):
        if not kept or first >= kept[-1][1]:
            kept.append((first, stop))
    return kept


def covers(kept: list[Range], total: int) -> bool:
    """Whether ``kept``, disjoint, holds all of ``0 .. total - 1``."""
    return sum(stop - first for first, stop in kept) == total
