"""Token n-grams that a pool shares with reference and evaluation sets, found at the speed of memory. Pure NumPy.

An n-gram is n consecutive token ids within one sample. Every n-gram of n >= 7 ids, wherever it begins in an array of ids,
holds ``(n - 3) // 4`` whole groups of four ids that begin at multiples of four. So only these groups are looked at: their
hash, read straight off the ids as 64-bit words, is looked up in a bit table of all that the references have at any offset.
What the table lets through is looked up exactly, and what is left is compared id by id: hashes decide nothing.

Ids are compared, not text. A tokenizer may cut a text differently at the beginning of a sample, where a word has no space
before it, or after another document of a packed context, so that the first one or two ids of a copied passage can differ;
from there on they agree. An overlap is therefore missed only where a copied passage is hardly longer than n.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.order import derive_key

MIN_NGRAM = 7
_GROUP = 4  # ids
_MAX_GROUPS = 4  # more cost time and save little
_BLOCK = 1 << 14  # groups hashed at a time: temporaries stay in the processor's cache
_TABLE_BITS_PER_ENTRY = 64
_MAX_TABLE_BITS = 27  # 16 MiB


@dataclasses.dataclass(frozen=True)
class Overlaps:
    """n-grams of samples that are also in a reference, each (sample, n-gram) once.

    Attributes:
        sample: int64[k], number of the sample among those searched.
        ngram: int64[k], number of the distinct reference n-gram.
        count: int64[k], how often it is in the sample.
    """

    sample: np.ndarray
    ngram: np.ndarray
    count: np.ndarray


class ReferenceNgrams:
    """The distinct n-grams of some examples, ready to be searched for.

    Args:
        tokens: unsigned integer ids of all examples, one after the other; uint16 or uint32, as the pool's.
        lengths: int64[num_examples], of each.
        ngram: ids per n-gram, at least ``MIN_NGRAM``.
        table_bits: base-2 logarithm of the bit table's size; by the number of n-grams when None.
        hash_bits: of the exact look-up's hashes; fewer than 64 only make more to compare.

    Attributes:
        ngram: ids per n-gram.
        num_ngrams: distinct n-grams.
        distinct: [num_ngrams, ngram], their ids.

    Raises:
        UserError: ``ngram`` is too small.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, ngram: int, *, table_bits: int | None = None, hash_bits: int = 64) -> None:
        if ngram < MIN_NGRAM:
            raise UserError(f"n-grams of {ngram} tokens are everyday phrases; --ngram is at least {MIN_NGRAM}")
        self.ngram = ngram
        self._num_groups = min((ngram - _GROUP + 1) // _GROUP, _MAX_GROUPS)
        self._hash_shift = np.uint64(64 - hash_bits)
        starts = _window_starts(lengths, ngram)
        windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(tokens, ngram)[starts] if len(starts) else tokens[:0])
        rows = windows.view(np.dtype((np.void, ngram * tokens.itemsize))).ravel()
        _, first, numbers = np.unique(rows, return_index=True, return_inverse=True)
        # Numbered in the order of their hashes.
        distinct = windows.reshape(-1, ngram)[first]
        hashes = self._window_hashes(distinct)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self.distinct = hashes[order], distinct[order]
        self.num_ngrams = len(order)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        examples = np.repeat(np.arange(len(lengths)), np.maximum(lengths - ngram + 1, 0))
        owners, self._examples = np.divmod(_distinct(place[numbers] * len(lengths) + examples), max(len(lengths), 1))
        self._first_example = np.searchsorted(owners, np.arange(self.num_ngrams + 1))
        self._build_table(tokens, lengths, table_bits)

    def examples_of(self, ngrams: np.ndarray) -> np.ndarray:
        """Numbers int64 of the examples that hold any of these n-grams, ascending, each once."""
        parts = [self._examples[self._first_example[number] : self._first_example[number + 1]] for number in ngrams]
        return _distinct(np.concatenate([self._examples[:0], *parts]))

    def search(self, tokens: np.ndarray, lengths: np.ndarray) -> Overlaps:
        """n-grams of some samples that are also in an example.

        Args:
            tokens: ids of all samples, one after the other, of the references' dtype.
            lengths: int64[num_samples], of each.
        """
        stops = np.cumsum(lengths)
        starts = self._possible_starts(tokens)
        # Within one sample: its end lies at or behind the n-gram's.
        sample = np.searchsorted(stops, starts, side="right")
        inside = starts + self.ngram <= stops[np.minimum(sample, len(stops) - 1)] if len(stops) else np.zeros(0, dtype=bool)
        starts, sample = starts[inside], sample[inside]
        number = self._find(tokens[starts[:, None] + np.arange(self.ngram)])
        found = number >= 0
        pairs = sample[found] * self.num_ngrams + number[found]
        pairs, count = np.unique(pairs, return_counts=True)
        sample, ngram = np.divmod(pairs, max(self.num_ngrams, 1))
        return Overlaps(sample, ngram, count)

    def _build_table(self, tokens: np.ndarray, lengths: np.ndarray, table_bits: int | None) -> None:
        """Enter what an n-gram of the examples can have where a pool's groups begin: every run of groups, at any offset."""
        span = self._num_groups * _GROUP
        starts = _window_starts(lengths, self.ngram)
        starts = _distinct(np.concatenate([starts + offset for offset in range(self.ngram - span + 1)]))
        groups = tokens[starts[:, None] + np.arange(span)] if len(starts) else np.empty((0, span), dtype=tokens.dtype)
        words = _words(np.ascontiguousarray(groups).ravel()).reshape(-1, self._num_groups)
        hashes = _distinct(sum((words[:, number] * key for number, key in enumerate(_KEYS[: self._num_groups])), np.uint64(0)))
        if table_bits is None:
            table_bits = min(max(16, (len(hashes) * _TABLE_BITS_PER_ENTRY).bit_length()), _MAX_TABLE_BITS)
        assert table_bits >= 3
        self._group_hashes, self._table_shift = hashes, np.uint64(64 - table_bits)
        self._table = np.zeros(1 << (table_bits - 3), dtype=np.uint8)
        entries = hashes >> self._table_shift
        np.bitwise_or.at(self._table, (entries >> np.uint64(3)).astype(np.int64), np.uint8(1) << (entries & np.uint64(7)).astype(np.uint8))

    def _possible_starts(self, tokens: np.ndarray) -> np.ndarray:
        """int64, ascending: a superset of where n-grams of an example begin, some of them beyond the end."""
        words = _words(tokens[: len(tokens) // _GROUP * _GROUP])
        last = self._num_groups - 1
        found = []
        for first in range(0, len(words) - last, _BLOCK):
            part = words[first : first + _BLOCK + last]
            hashes = part[: len(part) - last] * _KEYS[0]
            for number in range(1, self._num_groups):
                hashes += part[number : len(part) - last + number] * _KEYS[number]
            entries = hashes >> self._table_shift
            bit = (entries & np.uint64(7)).astype(np.uint8)
            entries >>= np.uint64(3)
            maybe = np.flatnonzero((self._table.take(entries.view(np.int64)) >> bit) & 1)
            if maybe.size:
                found.append(first + maybe[_contains(self._group_hashes, hashes[maybe])])
        groups = np.concatenate([np.empty(0, dtype=np.int64), *found])
        # The first whole group of an n-gram begins within the first four places of it.
        starts = (groups * _GROUP)[:, None] - np.arange(_GROUP)[::-1]
        return _distinct(starts[starts >= 0])

    def _find(self, windows: np.ndarray) -> np.ndarray:
        """Number of the distinct n-gram that each of ``windows`` [k, ngram] is, -1 where it is none; int64[k]."""
        number = np.full(len(windows), -1, dtype=np.int64)
        hashes = self._window_hashes(windows)
        place = np.searchsorted(self._hashes, hashes)
        open_ = np.flatnonzero(place < self.num_ngrams)
        while open_.size:  # once, but where distinct n-grams share a hash
            open_ = open_[self._hashes[place[open_]] == hashes[open_]]
            same = (self.distinct[place[open_]] == windows[open_]).all(axis=1)
            number[open_[same]] = place[open_[same]]
            open_ = open_[~same]
            place[open_] += 1
            open_ = open_[place[open_] < self.num_ngrams]
        return number

    def _window_hashes(self, windows: np.ndarray) -> np.ndarray:
        total = np.zeros(len(windows), dtype=np.uint64)
        for number in range(self.ngram):
            total = (total ^ windows[:, number]) * _KEYS[0]
            total ^= total >> np.uint64(29)
        return total >> self._hash_shift


_KEYS = np.array([derive_key("contamination", number) | 1 for number in range(_MAX_GROUPS)], dtype=np.uint64)


def _words(tokens: np.ndarray) -> np.ndarray:
    """uint64, one for each group of four ids: the ids themselves where they have 16 bits, else a hash of them."""
    words = np.ascontiguousarray(tokens).view(np.uint64)
    return words if tokens.itemsize == 2 else words[0::2] * _KEYS[-1] + words[1::2]


def _window_starts(lengths: np.ndarray, ngram: int) -> np.ndarray:
    """Where the n-grams of consecutive arrays of these lengths begin, int64, ascending; none lies across two."""
    counts = np.maximum(lengths - ngram + 1, 0)
    first = np.cumsum(lengths) - lengths
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _distinct(values: np.ndarray) -> np.ndarray:
    """Ascending, each once; several times faster than ``np.unique`` of large arrays."""
    values = np.sort(values, axis=None)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def _contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    place = np.searchsorted(ascending, values)
    return ascending[np.minimum(place, len(ascending) - 1)] == values if len(ascending) else np.zeros(len(values), dtype=bool)
