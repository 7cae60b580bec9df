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

Documents as rows (:mod:`megatron_groupmates.pool.contexts`): a global sample is then a context cut from the stream of the
segment's documents, which begins with a whole document in every segment. A segment serves the contexts that its documents fill.

- A document is consumed once a segment has served any part of it, also one cut by the end of its segment: what is left of it
  is not served in this window.
- The last documents of a stream do not fill a context. They are left out, and count as consumed when the segment has
  served all its contexts: no document goes round and round because of its place at the end.
- "No row is eligible" above reads "the eligible rows do not fill a context". A generation whose rows do not fill one context
  together is an error.

The first entry's ``effective_sample`` is the first sample of the order; there is nothing to look up below it.

An entry changes nothing before its ``effective_sample``, so a log that has grown gives the same samples for all it
already covered, and a replay after a roll-back repeats them exactly.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.contexts import Contexts, DocumentStream, Packing, join_contexts
from megatron_groupmates.pool.log import LogEntry, validate_entries
from megatron_groupmates.pool.rowset import RowSet, as_packed, count_rows, pack_rows

_WORD = (1 << 64) - 1
_NUM_ROUNDS = 8
_FEW = 4  # positions permuted one by one
_CHUNK = 1 << 15  # positions permuted at a time: temporaries stay in the processor's cache
_BLOCK = 1 << 20  # positions whose rows are marked as served at a time


def _mix(values: np.ndarray) -> np.ndarray:
    """Bijective mixing of uint64 values (the finaliser of SplitMix64); wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=64)
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


def _feistel_of_one(value: int, num_columns: int, num_rows: int, keys: list[int]) -> int:
    """:func:`_feistel` of one number, in whole numbers of Python: quicker than arrays of so few."""
    row, column = divmod(value, num_columns)
    for number, key in enumerate(keys):
        mixed = ((column if number % 2 else row) + key) & _WORD
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _WORD
        mixed ^= mixed >> 31
        if number % 2:
            row = (row + mixed) % num_rows
        else:
            column = (column + mixed) % num_columns
    return row * num_columns + column


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
    if positions.size <= _FEW:
        few_keys = keys.tolist()
        for number, value in enumerate(positions.tolist()):
            value = _feistel_of_one(value, num_columns, num_rows, few_keys)
            while value >= size:
                value = _feistel_of_one(value, num_columns, num_rows, few_keys)
            result[number] = value
        return result
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
    """What an entry serves. Arrays are packed bits (:func:`pack_rows`), an eighth of a byte per pool row.

    ``stream`` is None where each row is one sample. ``served`` is None for the last segment, which is still open.
    """

    entry: LogEntry
    key: int
    eligible: RowSet
    stream: DocumentStream | None
    consumed_before: np.ndarray
    window: int
    served: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Samples that the segment can serve."""
        return self.eligible.size if self.stream is None else self.stream.num_contexts

    def num_rows_begun(self, num_samples: int) -> int:
        """How many rows, from the first of the segment's order on, the first ``num_samples`` samples hold a part of."""
        return num_samples if self.stream is None else self.stream.num_begun(num_samples)

    def rows_at(self, first: int, stop: int) -> np.ndarray:
        """Pool rows int64[stop - first] at these positions of the segment's order."""
        return self.eligible.select(_ranks_at(self.eligible.size, self.key, first, stop))


@dataclasses.dataclass(frozen=True)
class OrderPreparation:
    """What :meth:`SampleOrder.preparation` says is worth doing beforehand; small enough to send to another process.

    Attributes:
        segment: number of the order's last segment.
        num_rows: how many rows, from the first of its order on, to look up.
        eligible: rows of the segment.
        key: of its order.
        excluded: packed rows that no generation may serve.
        context_length: tokens of a sample packed from documents; None where each row is one sample.
    """

    segment: int
    num_rows: int
    eligible: RowSet
    key: int
    excluded: np.ndarray
    context_length: int | None

    def served(self) -> np.ndarray:
        """The rows, packed: for :meth:`SampleOrder.keep`."""
        return _rows_between(self.eligible, self.key, 0, self.num_rows)

    def allows(self, rows: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether the packed ``rows`` that are not excluded are enough for a sample; ``lengths`` are those of all pool rows."""
        allowed = np.unpackbits(rows & ~self.excluded, count=len(lengths)).view(bool)
        return Packing(lengths, self.context_length).num_samples(allowed) > 0


def _rows_between(eligible: RowSet, key: int, start: int, stop: int) -> np.ndarray:
    """Packed bits of the rows at positions ``start`` to ``stop - 1`` of a segment's order, by a pass over all rows."""
    flags = np.zeros(eligible.size, dtype=bool)
    for first in range(start, stop, _BLOCK):
        flags[permute(np.arange(first, min(first + _BLOCK, stop)), eligible.size, key)] = True
    return eligible.subset(flags)


def _ranks_at(size: int, key: int, first: int, stop: int) -> np.ndarray:
    return permute(np.arange(first, stop), size, key)


class SampleOrder:
    """Global sample numbers to pool rows (semantics in the module's docstring).

    Immutable as far as callers see: :meth:`extended` gives a new order and leaves this one valid, so that a new
    generation can be prepared beside the one in use. Threads may share it. Memory is three and a half bits per pool row
    and entry.

    Nothing is worked out on first use: :meth:`rows` costs the same from the first call on, and :meth:`extended` takes
    milliseconds for tens of millions of rows, but for one thing, the rows that the last segment has served so far
    (about a tenth of a microsecond each). :meth:`prepare_to_extend` does that part beforehand, in another thread.

    Args:
        num_pool_samples: rows in the pool.
        seed: seed of the run's data order.
        entries: the generation log, oldest first; at least one.
        masks: for each generation in ``entries``, bool[num_pool_samples], True where the row is selected, or the same bits
            packed (:func:`~megatron_groupmates.pool.rowset.pack_rows`).
        packing: how rows become samples; None where each row is one sample and only :meth:`rows` will be asked for.
        excluded: bool[num_pool_samples], True where no generation may serve the row, whatever its mask says; None for no
            such row. Excluded rows count as consumed in every window.

    Raises:
        UserError: the entries contradict each other, leave samples that nothing serves, or name a generation too small
            for one sample.
    """

    def __init__(
        self,
        num_pool_samples: int,
        seed: int,
        entries: Sequence[LogEntry],
        masks: Mapping[int, np.ndarray],
        packing: Packing | None = None,
        excluded: np.ndarray | None = None,
    ) -> None:
        if not entries:
            raise UserError("the generation log has no entry, so no generation says which samples to train on")
        self.num_pool_samples = num_pool_samples
        self.seed = seed
        self._packing = packing
        self._excluded = pack_rows(np.zeros(num_pool_samples, dtype=bool) if excluded is None else excluded)
        self._segments: list[_Segment] = []
        self._prepared = (-1, 0, np.empty(0, dtype=np.uint8))  # segment number, rows of its order, the same packed
        validate_entries(entries)
        for entry in entries:
            self._append(entry, masks[entry.generation])

    @property
    def entries(self) -> tuple[LogEntry, ...]:
        """The generation log this order follows."""
        return tuple(segment.entry for segment in self._segments)

    def extended(self, entry: LogEntry, mask: np.ndarray) -> SampleOrder:
        """The order after ``entry`` is committed too; ``mask`` is its generation's, bool[num_pool_samples] or packed.

        Raises:
            UserError: ``entry`` does not follow the entries there are.
        """
        validate_entries((*self.entries, entry))
        order = copy.copy(self)
        order._segments = list(self._segments)
        order._append(entry, mask)
        return order

    def prepare_to_extend(self, sample: int) -> None:
        """Work out which rows are served below ``sample``, so that :meth:`extended` at it or soon after is quick.

        Changes no result; another thread may call it while this order is in use. A ``sample`` outside the last
        segment's is taken to its nearest end.
        """
        preparation = self.preparation(sample)
        self.keep(preparation, preparation.served())

    def preparation(self, sample: int) -> OrderPreparation:
        """The work of :meth:`prepare_to_extend`, for another process to do."""
        number, last = len(self._segments) - 1, self._segments[-1]
        count = min(max(sample - last.entry.effective_sample, 0), last.size)
        context_length = None if self._packing is None else self._packing.context_length
        return OrderPreparation(number, last.num_rows_begun(count), last.eligible, last.key, self._excluded, context_length)

    def keep(self, preparation: OrderPreparation, served: np.ndarray) -> None:
        """Take what a :meth:`preparation` of this order gave; changes no result."""
        # One assignment: other threads see all of it or nothing.
        self._prepared = (preparation.segment, preparation.num_rows, served)

    def exhausted_at(self) -> int:
        """The first global sample number that no entry serves: where the last entry's rows run out."""
        last = self._segments[-1]
        return last.entry.effective_sample + last.size

    def rows(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pool rows of the global samples ``first_sample`` to ``first_sample + count - 1``, where each row is one sample.

        Returns:
            (rows int64[count], generations int64[count]): the pool row of each and the generation that serves it.

        Raises:
            IndexError: the range begins below the first entry or goes past :meth:`exhausted_at`, where an epoch entry is missing.
        """
        spans = self._spans(first_sample, count)
        rows = np.empty(count, dtype=np.int64)
        generations = np.empty(count, dtype=np.int64)
        for segment, first, stop in spans:
            start = segment.entry.effective_sample
            here = slice(start + first - first_sample, start + stop - first_sample)
            rows[here] = segment.rows_at(first, stop)
            generations[here] = segment.entry.generation
        return rows, generations

    def contexts(self, first_sample: int, count: int) -> Contexts:
        """Where the tokens of the global samples ``first_sample`` to ``first_sample + count - 1`` come from.

        Raises:
            IndexError: as :meth:`rows`.
        """
        assert self._packing is not None, "an order without the lengths of the rows"
        parts = []
        for segment, first, stop in self._spans(first_sample, count):
            if segment.stream is None:
                rows = segment.rows_at(first, stop)
                pieces = np.arange(stop - first + 1), rows, np.zeros_like(rows), self._packing.lengths[rows].astype(np.int64)
            else:
                pieces = segment.stream.pieces(first, stop - first)
            samples = np.arange(first, stop) + segment.entry.effective_sample
            parts.append(Contexts(samples, np.full(stop - first, segment.entry.generation), *pieces))
        return join_contexts(parts)

    def generation(self, sample: int) -> int:
        """The generation that serves global sample ``sample``.

        Raises:
            IndexError: as :meth:`rows`.
        """
        ((segment, _, _),) = self._spans(sample, 1)
        return segment.entry.generation

    def _spans(self, first_sample: int, count: int) -> list[tuple[_Segment, int, int]]:
        """Segments that serve these global samples, each with the first of its own samples and one past the last."""
        stop = first_sample + count
        begin = self._segments[0].entry.effective_sample
        if first_sample < begin or count < 0:
            raise IndexError(f"no global samples from {first_sample}, count {count}: the order begins at {begin}")
        if stop > self.exhausted_at():
            raise IndexError(
                f"global samples {first_sample} to {stop - 1} asked for, but generation "
                f"{self._segments[-1].entry.generation} runs out at {self.exhausted_at()}: "
                "an epoch entry must be committed first"
            )
        spans, sample = [], first_sample
        while sample < stop:
            number = self._segment_at(sample)
            segment = self._segments[number]
            end = stop if segment.served is None else min(stop, self._segments[number + 1].entry.effective_sample)
            start = segment.entry.effective_sample
            spans.append((segment, sample - start, end - start))
            sample = end
        return spans

    def consumed(self, sample: int) -> np.ndarray:
        """bool[num_pool_samples]: rows consumed, in the window that ``sample`` lies in, by global samples below it.

        Excluded rows are always among them.

        Raises:
            IndexError: ``sample`` is below the first entry's or above :meth:`exhausted_at`.
        """
        begin = self._segments[0].entry.effective_sample
        if not begin <= sample <= self.exhausted_at():
            raise IndexError(f"global sample {sample} is not between {begin} and {self.exhausted_at()}")
        number = self._segment_at(sample)
        segment = self._segments[number]
        served = self._served(number, sample - segment.entry.effective_sample)
        return self._unpack(segment.consumed_before | served)

    def _segment_at(self, sample: int) -> int:
        return bisect.bisect_right(self._segments, sample, key=lambda segment: segment.entry.effective_sample) - 1

    def _unpack(self, bits: np.ndarray) -> np.ndarray:
        return np.unpackbits(bits, count=self.num_pool_samples).view(bool)

    def _served(self, number: int, count: int) -> np.ndarray:
        """Packed bits of the rows that the first ``count`` samples of segment ``number`` serve."""
        segment = self._segments[number]
        if count == segment.size:
            return segment.eligible.bits
        stop, size = segment.num_rows_begun(count), segment.eligible.size
        prepared_number, start, served = self._prepared
        if prepared_number != number or start > stop:
            start, served = 0, np.zeros_like(segment.eligible.bits)
        if (stop - start) * 64 < size:
            rows = segment.rows_at(start, stop)
            served = served.copy()
            np.bitwise_or.at(served, rows >> 3, (128 >> (rows & 7)).astype(np.uint8))
            return served
        # So many that a pass over all rows costs less than looking up each.
        return served | _rows_between(segment.eligible, segment.key, start, stop)

    def _append(self, entry: LogEntry, mask: np.ndarray) -> None:
        """Close the last segment at the entry's effective sample and open the entry's own."""
        selected = as_packed(mask)
        expected_shape = (self.num_pool_samples,) if mask.dtype == bool else self._excluded.shape
        if mask.shape != expected_shape or not selected.any():
            raise UserError(
                f"generation {entry.generation} must select at least one of the pool's "
                f"{self.num_pool_samples} samples; its mask is {mask.dtype}{list(mask.shape)} with "
                f"{int(np.bitwise_count(selected).sum())} selected"
            )
        selected = selected & ~self._excluded
        if not selected.any():
            raise UserError(f"generation {entry.generation} selects only samples that data.exclude forbids; select others")
        consumed = self._excluded
        window, eligible = 0, selected
        if self._segments:
            consumed, window = self._close_last(entry)
            if entry.epoch == self._segments[-1].entry.epoch:
                eligible = selected & ~consumed
            elif count_rows(consumed) == self.num_pool_samples:
                eligible = np.zeros_like(selected)
            else:
                eligible = self._served_by(entry.generation, window)
        segment = self._segment(entry, eligible, consumed, window)
        if segment.size == 0:
            segment = self._segment(entry, selected, self._excluded, window + 1)
        if segment.size == 0:
            assert self._packing is not None
            num_tokens = self._packing.num_tokens(segment.eligible.mask(self.num_pool_samples))
            raise UserError(
                f"generation {entry.generation} selects documents of {num_tokens} tokens in all, fewer than one "
                f"context of {self._packing.context_length}; select more, or train on shorter sequences"
            )
        self._segments.append(segment)

    def _segment(self, entry: LogEntry, eligible: np.ndarray, consumed: np.ndarray, window: int) -> _Segment:
        rows, packing, stream = RowSet(eligible), self._packing, None
        key = derive_key("sample order", self.seed, entry.generation, entry.epoch)
        if packing is not None and packing.context_length is not None:
            stream = DocumentStream(rows, functools.partial(_ranks_at, rows.size, key), packing)
        return _Segment(entry=entry, key=key, eligible=rows, stream=stream, consumed_before=consumed, window=window)

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
