"""Embeddings and individual influences of a pool on disk: as they were computed, and once more by cluster.

A store is a directory of parts, each the rows ``first .. stop - 1``: ``part-<first>-<stop>.npy`` with their embeddings and
``individual-<first>-<stop>.npy`` with their influences. Whatever is read from it is as large as what was asked for: a pool
of tens of millions of samples, tens of gigabytes, is never in memory as a whole.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.selection.matrix import MatrixFile
from megatron_groupmates.utils.files import atomic_directory, atomic_file, read_sealed_json, sealed, write_json

_NAME = re.compile(r"part-(\d+)-(\d+)\.npy")
_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))
_READ_GAP = 4  # rows between two that are asked for, up to which reading them is cheaper than a call of its own
_READ_BYTES = 8 << 20
_SAMPLE_ROWS = 1024  # by which embeddings are known again, besides their influences
_REMEDY = "remove the directory and repeat the stage that wrote it"

_CLUSTERS_FILE, _CLUSTERS_FORMAT, _CLUSTERS_VERSION = "clusters.json", "groupmates-clusters", 1


class Store(Protocol):
    """Embeddings and individual influences of rows ``0 .. num_rows - 1``.

    Attributes:
        num_rows: n.
        dim: d, numbers of an embedding.
        dtype: of the embeddings: float16, or float32 for features that no model projected.
        individual: float64 ``[n]``.
    """

    num_rows: int
    dim: int
    dtype: np.dtype
    individual: np.ndarray

    def read(self, first: int, stop: int) -> np.ndarray:
        """Embeddings ``[stop - first, d]`` of the rows ``first .. stop - 1``."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings ``[k, d]`` of the ``rows`` int64 ``[k]``, ascending and each once."""
        ...


class ArrayStore:
    """A :class:`Store` in memory, of arrays that it does not copy."""

    def __init__(self, embeddings: np.ndarray, individual: np.ndarray) -> None:
        """Of embeddings ``[n, d]`` of any float type and influences ``[n]``."""
        assert embeddings.ndim == 2 and individual.shape == (len(embeddings),)
        self.num_rows, self.dim = embeddings.shape
        self.dtype = embeddings.dtype
        self.individual = np.asarray(individual, np.float64)
        self._embeddings = embeddings

    def read(self, first: int, stop: int) -> np.ndarray:
        """See :class:`Store`; a view."""
        return self._embeddings[first:stop]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See :class:`Store`."""
        return self._embeddings[rows]


@dataclass(frozen=True)
class Part:
    """The rows ``first .. stop - 1`` of a store, complete on disk."""

    first: int
    stop: int
    embeddings: MatrixFile
    individual: MatrixFile

    @classmethod
    def open(cls, directory: Path, first: int, stop: int) -> Part:
        """The part of these rows.

        Raises:
            ValueError: a file of it is missing, damaged, or holds another number of rows.
        """
        files = []
        for name in _file_names(first, stop):
            try:
                files.append(MatrixFile.open(directory / name))
            except (OSError, ValueError) as error:
                raise ValueError(f"{directory / name} cannot be used: {error}") from error
            if files[-1].num_rows != stop - first:
                raise ValueError(f"{directory / name} holds {files[-1].num_rows} rows, its name says {stop - first}")
        return cls(first, stop, *files)


class EmbeddingStore:
    """A :class:`Store` on disk, from :meth:`open`. May be pickled, and used by several threads and processes."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Of parts that follow one another from row 0 on, all of one dtype and dimension."""
        self._parts = list(parts)
        self._stops = np.array([part.stop for part in parts], np.int64)
        self.num_rows = parts[-1].stop
        self.dim, self.dtype = parts[0].embeddings.dim, parts[0].embeddings.dtype

    @classmethod
    def open(cls, directory: Path | str, num_rows: int | None = None) -> EmbeddingStore:
        """The store in ``directory``, of ``num_rows`` rows where that is given.

        Raises:
            UserError: parts are missing, overlap, are damaged or unlike one another, or hold another number of rows.
        """
        directory = Path(directory)
        ranges = part_ranges(directory)
        if not ranges:
            raise UserError(f"{directory} holds no embeddings; repeat the stage that writes them")
        end = 0
        for first, stop in ranges:
            if first > end:
                raise UserError(f"{directory} lacks the embeddings of rows {end} to {first - 1}; repeat the stage that writes them")
            if first < end:
                raise UserError(f"{directory} holds the rows {first} to {min(end, stop) - 1} twice; {_REMEDY}")
            end = stop
        if num_rows is not None and end != num_rows:
            raise UserError(f"{directory} holds embeddings of {end} rows where {num_rows} are expected; {_REMEDY}")
        try:
            parts = [Part.open(directory, first, stop) for first, stop in ranges]
        except ValueError as error:
            raise UserError(f"{error}; {_REMEDY}") from error
        head = parts[0].embeddings
        for part in parts:
            found = part.embeddings
            if (found.dim, found.dtype) != (head.dim, head.dtype):
                both = f"{found.dim} numbers of {found.dtype}, {head.path.name} of {head.dim} of {head.dtype}"
                raise UserError(f"{found.path} has rows of {both}; {_REMEDY}")
        return cls(parts)

    @functools.cached_property
    def individual(self) -> np.ndarray:
        """See :class:`Store`."""
        out = np.empty((self.num_rows, 1), np.float64)
        for part in self._parts:
            part.individual.read_into(0, out[part.first : part.stop])
        return out[:, 0]

    def read(self, first: int, stop: int) -> np.ndarray:
        """See :class:`Store`."""
        assert 0 <= first <= stop <= self.num_rows, f"rows {first} to {stop} of {self.num_rows}"
        out = np.empty((stop - first, self.dim), self.dtype)
        for part in self._overlapping(first, stop):
            begin, end = max(first, part.first), min(stop, part.stop)
            part.embeddings.read_into(begin - part.first, out[begin - first : end - first])
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See :class:`Store`."""
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), self.dim), self.dtype)
        if not len(rows):
            return out
        assert 0 <= rows[0] and rows[-1] < self.num_rows and (np.diff(rows) > 0).all(), "rows ascend, within the store"
        for part in self._overlapping(int(rows[0]), int(rows[-1]) + 1):
            begin, end = np.searchsorted(rows, (part.first, part.stop)).tolist()
            matrix = part.embeddings
            matrix.take_into(rows[begin:end] - part.first, out[begin:end], _READ_GAP, max(1, _READ_BYTES // matrix.row_bytes))
        return out

    def _overlapping(self, first: int, stop: int) -> Iterator[Part]:
        """Parts with a row among ``first .. stop - 1``."""
        number = int(np.searchsorted(self._stops, first, side="right"))
        while number < len(self._parts) and self._parts[number].first < stop:
            yield self._parts[number]
            number += 1


def write_part(directory: Path | str, first: int, embeddings: np.ndarray, individual: np.ndarray) -> None:
    """Write the rows from ``first`` on as a part of the store in ``directory``. Each part is there as a whole or not at all.

    Args:
        directory: of the store; made if missing.
        first: row.
        embeddings: float16 or float32 ``[k, d]``, k > 0.
        individual: ``[k]``, kept as float64.
    """
    assert embeddings.ndim == 2 and len(embeddings) and individual.shape == (len(embeddings),) and embeddings.dtype in _DTYPES
    stop = first + len(embeddings)
    # The embeddings, by whose file a part is known, come last: where they are, the influences are.
    columns = (embeddings, individual.astype(np.float64).reshape(-1, 1))
    for name, matrix in reversed([*zip(_file_names(first, stop), columns, strict=True)]):
        with atomic_file(Path(directory) / name) as file:
            np.save(file, np.ascontiguousarray(matrix))


def part_ranges(directory: Path | str) -> list[tuple[int, int]]:
    """First row, and one past the last, of every part in ``directory`` by its name, in order; their files are not opened."""
    names = (_NAME.fullmatch(path.name) for path in Path(directory).glob("part-*.npy"))
    return sorted((int(name[1]), int(name[2])) for name in names if name is not None)


def remove_part(directory: Path | str, first: int, stop: int) -> None:
    """Delete the part of these rows, so that they are missing."""
    for name in _file_names(first, stop):
        (Path(directory) / name).unlink(missing_ok=True)


def _file_names(first: int, stop: int) -> tuple[str, str]:
    """Of a part's embeddings and its influences."""
    rows = f"{first:012d}-{stop:012d}.npy"
    return f"part-{rows}", f"individual-{rows}"


class ClusterStore:
    """The rows of a store by cluster, within one ascending: a cluster's are read in one piece.

    From :func:`sort_by_cluster`, :meth:`open` or :meth:`from_arrays`. May be used by several threads and processes.

    Attributes:
        num_clusters: C, empty ones included.
        offsets: int64 ``[C + 1]``; cluster c has the positions ``offsets[c] .. offsets[c + 1] - 1``.
        rows: int64 ``[n]``, the store's row at each position.
        individual: float64 ``[n]``, influence at each position.
    """

    def __init__(self, offsets: np.ndarray, rows: np.ndarray, individual: np.ndarray, embeddings: MatrixFile | np.ndarray) -> None:
        """``embeddings`` by position from a file, or by row of the store in memory."""
        self.num_clusters = len(offsets) - 1
        self.offsets, self.rows, self.individual = offsets, rows, individual
        self._embeddings = embeddings

    @classmethod
    def from_arrays(
        cls, embeddings: np.ndarray, individual: np.ndarray, labels: np.ndarray, num_clusters: int | None = None
    ) -> ClusterStore:
        """Of embeddings ``[n, d]``, influences ``[n]`` and clusters int ``[n]`` in memory; the embeddings are not copied."""
        offsets, rows = _by_cluster(labels, num_clusters)
        return cls(offsets, rows, np.asarray(individual, np.float64)[rows], embeddings)

    @classmethod
    def open(cls, directory: Path | str) -> ClusterStore:
        """What :func:`sort_by_cluster` wrote to ``directory``. Rows and influences are mapped, embeddings read when asked for.

        Raises:
            UserError: there is none, or it is damaged.
        """
        directory = Path(directory)
        _read_facts(directory)
        try:
            offsets, rows, individual = (
                np.load(directory / f"{name}.npy", mmap_mode="r" if name != "offsets" else None)
                for name in ("offsets", "rows", "individual")
            )
            embeddings = MatrixFile.open(directory / "embeddings.npy")
        except (OSError, ValueError) as error:
            raise UserError(f"{directory} is damaged: {error}; {_REMEDY}") from error
        sizes = {int(offsets[-1]), len(rows), len(individual), embeddings.num_rows}
        if len(sizes) > 1:
            raise UserError(f"{directory} is damaged: its files hold {' and '.join(map(str, sorted(sizes)))} rows; {_REMEDY}")
        return cls(offsets, rows, individual, embeddings)

    def embeddings(self, cluster: int) -> np.ndarray:
        """Embeddings ``[k, d]`` of a cluster's rows."""
        first, stop = int(self.offsets[cluster]), int(self.offsets[cluster + 1])
        if isinstance(self._embeddings, MatrixFile):
            return self._embeddings.read(first, stop)
        return self._embeddings[self.rows[first:stop]]


def sort_by_cluster(
    store: Store, labels: np.ndarray, directory: Path | str, num_clusters: int | None = None, memory_bytes: int = 1 << 30
) -> ClusterStore:
    """Write the rows of ``store`` once more, by cluster, to ``directory``; one that is finished, of the same rows, is used as it is.

    The store is read once, block by block; a block's rows of one cluster are written in one piece. The larger the blocks, the
    fewer and longer the writes. What is written depends on neither.

    Args:
        store: embeddings and influences.
        labels: int32 ``[n]``, each row's cluster.
        directory: for the result; replaced if it holds that of other rows or labels.
        num_clusters: above the largest label where the last clusters are empty.
        memory_bytes: for blocks of embeddings; some 40 bytes for each row of the store come on top.

    Raises:
        UserError: ``directory`` is there but holds no clusters.
    """
    assert len(labels) == store.num_rows
    directory = Path(directory)
    offsets, rows = _by_cluster(labels, num_clusters)
    facts = {
        "format": _CLUSTERS_FORMAT,
        "version": _CLUSTERS_VERSION,
        "num_rows": store.num_rows,
        "dim": store.dim,
        "dtype": store.dtype.name,
        "num_clusters": len(offsets) - 1,
        "labels": _digest(labels.astype(np.int32, copy=False)),
        "individual": _digest(store.individual),
        "sample": _digest(store.take(np.linspace(0, store.num_rows - 1, min(store.num_rows, _SAMPLE_ROWS)).astype(np.int64))),
    }
    if directory.exists():
        if _read_facts(directory) == sealed(facts):
            return ClusterStore.open(directory)
        shutil.rmtree(directory)
    with atomic_directory(directory) as partial:
        np.save(partial / "offsets.npy", offsets)
        np.save(partial / "rows.npy", rows)
        np.save(partial / "individual.npy", store.individual[rows])
        del rows
        matrix = MatrixFile.create(partial / "embeddings.npy", store.num_rows, store.dim, store.dtype)
        _scatter(store, labels, offsets, matrix, max(1, memory_bytes // (2 * matrix.row_bytes)))
        write_json(partial / _CLUSTERS_FILE, sealed(facts))
    return ClusterStore.open(directory)


def _scatter(store: Store, labels: np.ndarray, offsets: np.ndarray, matrix: MatrixFile, block_rows: int) -> None:
    """Write every row to its place in ``matrix``, ``block_rows`` at a time."""
    ends = offsets[:-1].copy()
    with open(matrix.path, "r+b", buffering=0) as file:
        for first in range(0, store.num_rows, block_rows):
            block_labels = labels[first : first + block_rows]
            block = store.read(first, first + len(block_labels))
            order = np.argsort(block_labels, kind="stable")
            clusters, begins = np.unique(block_labels[order], return_index=True)
            stops = [*begins[1:].tolist(), len(order)]
            for cluster, begin, stop in zip(clusters.tolist(), begins.tolist(), stops, strict=True):
                matrix.write(file, int(ends[cluster]), block[order[begin:stop]])
                ends[cluster] += stop - begin


def _by_cluster(labels: np.ndarray, num_clusters: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 ``[C + 1]`` and rows int64 ``[n]`` of a :class:`ClusterStore`."""
    sizes = np.bincount(labels, minlength=num_clusters or 0)
    assert num_clusters is None or len(sizes) == num_clusters, f"a label is {len(sizes) - 1}, there are {num_clusters} clusters"
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), np.argsort(labels, kind="stable").astype(np.int64, copy=False)


def _read_facts(directory: Path) -> dict[str, Any]:
    path = directory / _CLUSTERS_FILE
    if not path.exists():
        raise UserError(f"{directory} holds no rows sorted by cluster: it has no {_CLUSTERS_FILE}; {_REMEDY}")
    return read_sealed_json(path, "a description of clusters", _CLUSTERS_FORMAT, _CLUSTERS_VERSION, _REMEDY)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
