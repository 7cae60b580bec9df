"""The order of training samples: a pure function of pool size, seed, generation log and generations.

Global sample number g (Megatron's ``consumed_train_samples`` counting) gives one pool row, whatever the data-parallel
size, the number of workers or the prefetch depth. Nothing here reads or writes files, and nothing uses a library's
random generator, whose streams may change between versions: the order of a run is frozen for ever.

Semantics of the generation log
-------------------------------

Each log entry opens a *segment*: the global samples from its ``effective_sample`` to the next entry's. A segment
serves its *eligible* rows, each once, in the order of a permutation keyed by (seed, generation, epoch); a segment that
is ended early by the next entry has served the first part of it. Segments follow each other in *consumption windows*; a
row is *consumed* once a segment of the current window has served it.

- An adoption (same epoch as the entry before) makes eligible the rows of its generation that are not consumed. If there
  are none, a new window begins and all rows of the generation are eligible.
- When a segment has served all its rows, the trainer commits an epoch entry (:func:`next_epoch_entry`). If every row
  of the pool is consumed, a new window begins and all rows of the generation are eligible. Otherwise only the selection
  has run out: the rows that this generation itself has served in the current window are served again in a new order;
  rows consumed under other generations stay excluded.
- A new window forgets what was consumed. Within a window no row is served twice, but for the repeats of epoch entries.

An entry changes nothing before its ``effective_sample``, so a log that has grown gives the same samples for all it
already covered, and a replay after a roll-back repeats them exactly.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.log import LogEntry, validate_entries

_WORD = (1 << 64) - 1
_NUM_ROUNDS = 8
_CHUNK = 1 << 15  # positions permuted at a time: temporaries stay in the processor's cache
_NUM_CACHED_SEGMENTS = 2  # a batch may straddle two segments


def _mix(values: np.ndarray) -> np.ndarray:
    """Bijective mixing of uint64 values (the finaliser of SplitMix64); wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(key: int) -> np.ndarray:
    """uint64[rounds], the first outputs of SplitMix64 started at ``key``."""
    states = [(key + (number + 1) * 0x9E3779B97F4A7C15) & _WORD for number in range(_NUM_ROUNDS)]
    return _mix(np.array(states, dtype=np.uint64))


def _feistel(values: np.ndarray, num_columns: int, num_rows: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of range(num_columns * num_rows), uint64 in and out.

    A number is a (row, column) pair; rounds add a hash of the one to the other in turn, modulo its range. Each round
    can be undone, so the whole is a bijection for every pair of ranges.
    """
    column_range, row_range = np.uint64(num_columns), np.uint64(num_rows)
    row, column = np.divmod(values, column_range)
    for number in range(0, _NUM_ROUNDS, 2):
        column = (column + _mix(row + keys[number]) % column_range) % column_range
        row = (row + _mix(column + keys[number + 1]) % row_range) % row_range
    return row * column_range + column


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at ``positions``.

    Frozen: its values for given arguments never change between versions of this package. Memory is that of the result.

    Args:
        positions: int64[n], each in range(size), in any order.
        size: number of things permuted, from 0 on, below 2**62.
        key: 64-bit key; each gives its own permutation.

    Returns:
        int64[n], the images.

    Raises:
        IndexError: a position is outside range(size).
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size == 0:
        return np.empty(0, dtype=np.int64)
    if positions.min() < 0 or positions.max() >= size:
        raise IndexError(f"positions {positions.min()} to {positions.max()} are not all in range({size})")
    num_columns = math.isqrt(size - 1) + 1
    num_rows = -(-size // num_columns)
    keys = _round_keys(key)
    result = np.empty(positions.shape, dtype=np.int64)
    for first in range(0, positions.size, _CHUNK):
        values = _feistel(positions[first : first + _CHUNK].astype(np.uint64), num_columns, num_rows, keys)
        # Cycle walking: the rectangle is a little larger than the range; what lands outside goes round again.
        outside = np.flatnonzero(values >= size)
        while outside.size:
            values[outside] = _feistel(values[outside], num_columns, num_rows, keys)
            outside = outside[values[outside] >= size]
        result[first : first + _CHUNK] = values
    return result


def derive_key(*facts: int | str) -> int:
    """A 64-bit key from the facts that name its purpose, for :func:`permute`. Frozen."""
    text = "/".join(str(fact) for fact in facts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@dataclasses.dataclass(frozen=True)
class _Segment:
    """What an entry serves. Row sets are packed bits (``np.packbits``), an eighth of a byte per pool row.

    ``served`` is None for the last segment, which is still open.
    """

    entry: LogEntry
    key: int
    size: int
    eligible: np.ndarray
    consumed_before: np.ndarray
    window: int
    served: np.ndarray | None = None


class SampleOrder:
    """Global sample numbers to pool rows (semantics in the module's docstring).

    Immutable as far as callers see: :meth:`extended` gives a new order and leaves this one valid, so that a new
    generation can be prepared beside the one in use. Memory is three bits per pool row and entry, plus the eligible
    rows (4 or 8 bytes each) of the last two segments asked for.

    Args:
        num_pool_samples: rows in the pool.
        seed: seed of the run's data order.
        entries: the generation log, oldest first; at least one.
        masks: for each generation in ``entries``, bool[num_pool_samples], True where the row is selected.

    Raises:
        UserError: the entries contradict each other, or leave samples that nothing serves.
    """

    def __init__(self, num_pool_samples: int, seed: int, entries: Sequence[LogEntry], masks: Mapping[int, np.ndarray]) -> None:
        if not entries:
            raise UserError("the generation log has no entry, so no generation says which samples to train on")
        self.num_pool_samples = num_pool_samples
        self.seed = seed
        self._segments: list[_Segment] = []
        self._row_cache: dict[int, np.ndarray] = {}
        validate_entries(entries)
        for entry in entries:
            self._append(entry, masks[entry.generation])

    @property
    def entries(self) -> tuple[LogEntry, ...]:
        """The generation log this order follows."""
        return tuple(segment.entry for segment in self._segments)

    def extended(self, entry: LogEntry, mask: np.ndarray) -> SampleOrder:
        """The order after ``entry`` is committed too; ``mask`` is its generation's, bool[num_pool_samples].

        Raises:
            UserError: ``entry`` does not follow the entries there are.
        """
        validate_entries((*self.entries, entry))
        order = copy.copy(self)
        order._segments = list(self._segments)
        order._row_cache = dict(self._row_cache)
        order._append(entry, mask)
        return order

    def exhausted_at(self) -> int:
        """The first global sample number that no entry serves: where the last entry's rows run out."""
        last = self._segments[-1]
        return last.entry.effective_sample + last.size

    def rows(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pool rows of the global samples ``first_sample`` to ``first_sample + count - 1``.

        Returns:
            (rows int64[count], generations int64[count]): the pool row of each and the generation that serves it.

        Raises:
            IndexError: the range begins below 0 or goes past :meth:`exhausted_at`, where an epoch entry is missing.
        """
        stop = first_sample + count
        if first_sample < 0 or count < 0:
            raise IndexError(f"no global samples from {first_sample}, count {count}")
        if stop > self.exhausted_at():
            raise IndexError(
                f"global samples {first_sample} to {stop - 1} asked for, but generation "
                f"{self._segments[-1].entry.generation} runs out at {self.exhausted_at()}: "
                "an epoch entry must be committed first"
            )
        rows = np.empty(count, dtype=np.int64)
        generations = np.empty(count, dtype=np.int64)
        sample = first_sample
        while sample < stop:
            number = self._segment_at(sample)
            segment = self._segments[number]
            following = self._segments[number + 1].entry.effective_sample if segment.served is not None else stop
            end = min(stop, following)
            start = segment.entry.effective_sample
            here = slice(sample - first_sample, end - first_sample)
            positions = np.arange(sample - start, end - start)
            rows[here] = self._eligible_rows(number)[permute(positions, segment.size, segment.key)]
            generations[here] = segment.entry.generation
            sample = end
        return rows, generations

    def consumed(self, sample: int) -> np.ndarray:
        """bool[num_pool_samples]: rows consumed, in the window that ``sample`` lies in, by global samples below it.

        Raises:
            IndexError: ``sample`` is below 0 or above :meth:`exhausted_at`.
        """
        if not 0 <= sample <= self.exhausted_at():
            raise IndexError(f"global sample {sample} is not between 0 and {self.exhausted_at()}")
        number = self._segment_at(sample)
        segment = self._segments[number]
        served = self._served(number, sample - segment.entry.effective_sample)
        return self._unpack(segment.consumed_before | served)

    def _segment_at(self, sample: int) -> int:
        return bisect.bisect_right(self._segments, sample, key=lambda segment: segment.entry.effective_sample) - 1

    def _unpack(self, bits: np.ndarray) -> np.ndarray:
        return np.unpackbits(bits, count=self.num_pool_samples).view(bool)

    def _eligible_rows(self, number: int) -> np.ndarray:
        """Sorted pool rows eligible in segment ``number``."""
        rows = self._row_cache.pop(number, None)
        if rows is None:
            narrow = np.uint32 if self.num_pool_samples < 1 << 32 else np.int64
            rows = np.flatnonzero(self._unpack(self._segments[number].eligible)).astype(narrow)
        self._row_cache[number] = rows
        while len(self._row_cache) > _NUM_CACHED_SEGMENTS:
            del self._row_cache[next(iter(self._row_cache))]
        return rows

    def _served(self, number: int, count: int) -> np.ndarray:
        """Packed bits of the rows that the first ``count`` samples of segment ``number`` serve."""
        segment = self._segments[number]
        if count == segment.size:
            return segment.eligible
        served = np.zeros(self.num_pool_samples, dtype=bool)
        if count:
            served[self._eligible_rows(number)[permute(np.arange(count), segment.size, segment.key)]] = True
        return np.packbits(served)

    def _append(self, entry: LogEntry, mask: np.ndarray) -> None:
        """Close the last segment at the entry's effective sample and open the entry's own."""
        if mask.dtype != bool or mask.shape != (self.num_pool_samples,) or not mask.any():
            raise UserError(
                f"generation {entry.generation} must select at least one of the pool's "
                f"{self.num_pool_samples} samples; its mask is {mask.dtype}{list(mask.shape)} with "
                f"{int(mask.sum())} selected"
            )
        selected = np.packbits(mask)
        consumed = np.zeros_like(selected)
        window, eligible = 0, selected
        if self._segments:
            consumed, window = self._close_last(entry)
            if entry.epoch == self._segments[-1].entry.epoch:
                eligible = selected & ~consumed
            elif self._unpack(consumed).all():
                eligible = np.zeros_like(selected)
            else:
                eligible = self._served_by(entry.generation, window)
        if not eligible.any():
            window, eligible, consumed = window + 1, selected, np.zeros_like(selected)
        self._segments.append(
            _Segment(
                entry=entry,
                key=derive_key("sample order", self.seed, entry.generation, entry.epoch),
                size=int(self._unpack(eligible).sum()),
                eligible=eligible,
                consumed_before=consumed,
                window=window,
            )
        )

    def _close_last(self, entry: LogEntry) -> tuple[np.ndarray, int]:
        """End the last segment where ``entry`` begins; (packed consumed rows, window)."""
        number, last = len(self._segments) - 1, self._segments[-1]
        if entry.effective_sample > self.exhausted_at():
            raise UserError(
                f"generation log: generation {last.entry.generation} runs out at sample "
                f"{self.exhausted_at()}, but the next entry begins at {entry.effective_sample}"
            )
        if entry.epoch != last.entry.epoch and entry.effective_sample != self.exhausted_at():
            raise UserError(
                f"generation log: epoch {entry.epoch} begins at sample {entry.effective_sample}, but "
                f"generation {last.entry.generation} runs out at {self.exhausted_at()}; the log belongs "
                "to another pool, seed or selection"
            )
        served = self._served(number, entry.effective_sample - last.entry.effective_sample)
        self._segments[number] = dataclasses.replace(last, served=served)
        return last.consumed_before | served, last.window

    def _served_by(self, generation: int, window: int) -> np.ndarray:
        """Packed bits of the rows that ``generation`` has served in ``window``."""
        served = [segment.served for segment in self._segments if segment.window == window and segment.entry.generation == generation]
        return np.bitwise_or.reduce(served)


def next_epoch_entry(order: SampleOrder) -> LogEntry:
    """The entry to commit when the last entry's rows run out: same generation, next epoch."""
    last = order.entries[-1]
    return dataclasses.replace(last, effective_sample=order.exhausted_at(), epoch=last.epoch + 1)
