"""How a build is divided: samples into cells, cells into shards, work among ranks. Pure and frozen.

Each sample belongs to a *cell*, chosen by a hash of the seed, its file's name and its number in the file. The order of the
pool is the cells one after the other, the samples of each permuted by a key of the seed and the cell: a shuffle of the
whole of which any part can be worked out without the rest. Shards are cut from this order, so that all but the last are
full. The bytes of a pool follow from these functions: a change to one of them changes every pool that is made after it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from megatron_groupmates.pool.order import derive_key, permute

MAX_CELLS = 1 << 20
OTHER_KINDS = "(other)"
_HASH_BITS = 60


def count_cells(inputs: Sequence[tuple[str, int]], bytes_per_id: int, cell_bytes: int) -> int:
    """Number of cells such that one holds about ``cell_bytes`` of ids, at least 1.

    Args:
        inputs: (name, bytes) of the input files.
        bytes_per_id: 2 or 4.
        cell_bytes: ids of a cell, in bytes.
    """
    # A token is about five bytes of JSON lines, of which a compressor leaves two.
    num_tokens = sum(num_bytes // (5 if name.endswith(".jsonl") else 2) for name, num_bytes in inputs)
    return min(max(-(-num_tokens * bytes_per_id // cell_bytes), 1), MAX_CELLS)


def cells_of(seed: int, file_name: str, first_sample: int, count: int, num_cells: int) -> np.ndarray:
    """Cells of ``count`` consecutive samples of a file, int64[count], from number ``first_sample`` on."""
    numbers = np.arange(first_sample, first_sample + count)
    hashes = permute(numbers, 1 << _HASH_BITS, derive_key("pool cell", seed, file_name))
    return ((hashes >> (_HASH_BITS - 32)) * num_cells) >> 32


def order_in_cell(seed: int, cell: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """Which of a cell's samples (numbered by file, then by number in the file) stand at ``positions`` of it, int64[n]."""
    return permute(positions, num_samples, derive_key("pool cell order", seed, cell))


def cell_starts(samples_per_cell: np.ndarray) -> np.ndarray:
    """Position of each cell's first sample in the pool, int64[cells + 1]; the last is the number of samples."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(samples_per_cell, dtype=np.int64)])


def count_shards(num_samples: int, samples_per_shard: int) -> int:
    """Shards of a pool; all but the last are full."""
    return -(-num_samples // samples_per_shard)


def shards_of_cell(starts: np.ndarray, cell: int, samples_per_shard: int) -> range:
    """The shards whose first sample lies in a cell; ``starts`` as from :func:`cell_starts`."""
    first, stop = (count_shards(int(starts[number]), samples_per_shard) for number in (cell, cell + 1))
    return range(first, stop)


def deal(sizes: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal items to ranks such that the sums of their sizes are about equal.

    Returns:
        Item numbers of each rank, largest first. Every item is dealt once; equal arguments give equal deals.
    """
    loads = [(0, rank) for rank in range(world_size)]
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for item in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + sizes[item] + 1, rank))  # plus one: even an empty file is work
        hands[rank].append(item)
    return hands


def duplicates(digests: Sequence[str]) -> list[int | None]:
    """For each file the number of the first file with the same digest, None where it is the first itself."""
    first: dict[str, int] = {}
    found = [first.setdefault(digest, number) for number, digest in enumerate(digests)]
    return [None if original == number else original for number, original in enumerate(found)]


def merge_kinds(kinds_of_files: Sequence[Mapping[str, int]], limit: int) -> tuple[list[str], list[np.ndarray]]:
    """Kinds of a pool from those of its files.

    Args:
        kinds_of_files: for each file, samples of each kind, in the order in which the file numbers its kinds.
        limit: kinds a pool can have. Where there are more, those with most samples keep their names (the first of equals)
            and the rest become ``(other)``, which is the last.

    Returns:
        (names in order of first appearance, for each file the pool's number of each of its kinds, int16[kinds]).
    """
    totals: Counter[str] = Counter()
    for kinds in kinds_of_files:
        for kind, num_samples in kinds.items():
            totals[kind] += num_samples
    names = list(totals)
    if len(names) > limit:
        kept = {kind for kind, _ in totals.most_common(limit - 1)}
        names = [*(kind for kind in names if kind in kept), OTHER_KINDS]
    number_of = {kind: number for number, kind in enumerate(names)}
    other = len(names) - 1
    return names, [np.array([number_of.get(kind, other) for kind in kinds], dtype=np.int16) for kinds in kinds_of_files]


def score_at_rank(scores: Iterable[np.ndarray], rank: int) -> float:
    """The ``rank``-th largest of all scores (1 is the largest), exactly, in memory that does not depend on their number.

    Args:
        scores: float32 arrays without NaN; iterated over twice.
        rank: at least 1, at most the number of scores.
    """
    high, remaining = _bin_from_top(scores, rank, lambda keys: keys >> np.uint32(16))
    low, _ = _bin_from_top(scores, remaining, lambda keys: keys[keys >> np.uint32(16) == high] & np.uint32(0xFFFF))
    key = np.uint32(high << 16 | low)
    bits = key ^ np.uint32(0x80000000) if key >> np.uint32(31) else ~key
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _bin_from_top(scores: Iterable[np.ndarray], rank: int, bins: Callable[[np.ndarray], np.ndarray]) -> tuple[int, int]:
    """(16-bit bin in which the ``rank``-th largest key lies, its rank within that bin)."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for part in scores:
        bits = np.asarray(part, dtype=np.float32).view(np.uint32)
        # Unsigned integers in the order of the floats.
        keys = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))
        counts += np.bincount(bins(keys), minlength=1 << 16)
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return (1 << 16) - 1 - place, rank - int(above[place] - counts[::-1][place])
