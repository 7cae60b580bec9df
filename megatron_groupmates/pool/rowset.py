"""A set of pool rows as packed bits, from which the k-th smallest row is read without listing the rows."""

from __future__ import annotations

import numpy as np

_WORD_BITS = 64
_FEW = 4
_CHUNK = 1 << 14  # ranks looked up at a time: temporaries stay in the processor's cache

# Position from the left of the k-th set bit of each byte; meaningless where the byte has fewer.
_SELECT_IN_BYTE = np.argsort(1 - np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, kind="stable").astype(np.uint8)


def pack_rows(mask: np.ndarray) -> np.ndarray:
    """Bits of a bool array, in the order of ``np.packbits``, filled up with zeros to whole 64-bit words: uint8[8 * words]."""
    bits = np.packbits(mask)
    return np.concatenate([bits, np.zeros(-len(bits) % 8, dtype=np.uint8)])


def as_packed(mask: np.ndarray) -> np.ndarray:
    """``mask`` as :func:`pack_rows` gives it, whether it is a bool array or is packed already."""
    return mask if mask.dtype == np.uint8 else pack_rows(mask)


def count_rows(bits: np.ndarray) -> int:
    """Set bits of what :func:`pack_rows` gives."""
    return int(np.bitwise_count(bits.view(np.uint64)).sum(dtype=np.int64))


class RowSet:
    """Rows in ascending order, an eighth of a byte per pool row and a sixteenth (pools below 2**32 rows) for the counts.

    Immutable, so threads may share it.

    Args:
        bits: from :func:`pack_rows`; kept, not copied.

    Attributes:
        bits: the same.
        size: number of rows.
    """

    def __init__(self, bits: np.ndarray) -> None:
        narrow = np.uint32 if len(bits) * 8 < 1 << 32 else np.int64
        words = bits.view(np.uint64)
        self.bits = bits
        self._before = np.zeros(len(words) + 1, dtype=narrow)
        np.cumsum(np.bitwise_count(words), out=self._before[1:], dtype=narrow)
        self.size = int(self._before[-1])

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """The rows at ``ranks`` (int64[n], each in range(size)) of the ascending list of all rows, int64[n]."""
        if len(ranks) <= _FEW:
            return np.array([self._select_one(int(rank)) for rank in ranks], dtype=np.int64)
        rows = np.empty(len(ranks), dtype=np.int64)
        octets = self.bits.reshape(-1, _WORD_BITS // 8)
        for first in range(0, len(ranks), _CHUNK):
            wanted = ranks[first : first + _CHUNK].astype(self._before.dtype)
            word = np.searchsorted(self._before, wanted, side="right") - 1
            rank = (wanted - self._before[word]).astype(np.uint8)
            content = octets[word]
            upto = np.cumsum(np.bitwise_count(content), axis=1, dtype=np.uint8)
            octet = (upto <= rank[:, None]).sum(axis=1)
            each = np.arange(len(wanted))
            rank -= np.where(octet > 0, upto[each, octet - 1], 0).astype(np.uint8)
            rows[first : first + _CHUNK] = word * _WORD_BITS + octet * 8 + _SELECT_IN_BYTE[content[each, octet], rank]
        return rows

    def _select_one(self, rank: int) -> int:
        """:meth:`select` of one rank, in whole numbers of Python: quicker than arrays of so few."""
        word = int(np.searchsorted(self._before, self._before.dtype.type(rank), side="right")) - 1
        rank -= int(self._before[word])
        width = _WORD_BITS
        value = int.from_bytes(self.bits[word * width // 8 : (word + 1) * width // 8].tobytes(), "big")
        row = word * width
        while width > 1:
            width //= 2
            left = value >> width
            if rank < left.bit_count():
                value = left
            else:
                rank -= left.bit_count()
                row += width
                value &= (1 << width) - 1
        return row

    def mask(self, num_rows: int) -> np.ndarray:
        """bool[num_rows], True where the row is in the set."""
        return np.unpackbits(self.bits, count=num_rows).view(bool)

    def subset(self, flags: np.ndarray) -> np.ndarray:
        """Bits, as of :func:`pack_rows`, of the rows whose ranks are flagged; ``flags`` is bool[size]."""
        within = self.mask(8 * len(self.bits))
        within[within] = flags
        return pack_rows(within)
