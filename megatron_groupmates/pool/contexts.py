"""Contexts cut on the fly from a stream of documents: what a training sample is made of. Nothing here reads a sample.

The documents of a segment (:mod:`megatron_groupmates.pool.order`) follow each other in its order, and context number k
is tokens ``k * context_length`` to ``(k + 1) * context_length`` of that stream: contexts do not overlap, a long document
spans several, and documents are told apart by the end-of-text token that closes each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.rowset import RowSet

_BLOCK = 64  # documents between two kept sums
_CHUNK = 1 << 15  # documents summed at a time, a multiple of _BLOCK
_FAR = 1 << 20  # documents from which on a pass over the lengths of all costs less than finding the row of each


@dataclasses.dataclass(frozen=True)
class Packing:
    """How pool rows become training samples.

    Attributes:
        lengths: int[num_pool_samples], tokens of each pool row.
        context_length: tokens of a sample cut from the stream of documents; None where each pool row is one sample.
    """

    lengths: np.ndarray
    context_length: int | None = None

    @property
    def name(self) -> str:
        """``none`` or ``documents/<context_length>``: global sample numbers mean the same only under the same packing."""
        return "none" if self.context_length is None else f"documents/{self.context_length}"

    def num_samples(self, mask: np.ndarray | None = None) -> int:
        """Samples that the rows of ``mask`` (bool[num_pool_samples], all where None) make up, a last part of a context left out."""
        if self.context_length is None:
            return len(self.lengths) if mask is None else int(np.count_nonzero(mask))
        return self.num_tokens(mask) // self.context_length

    def num_tokens(self, mask: np.ndarray | None = None) -> int:
        """Tokens of the rows of ``mask``, of all rows where it is None."""
        if mask is None:
            return int(self.lengths.sum(dtype=np.int64))
        # In pieces that stay in the processor's cache: several times as fast as taking the lengths out.
        parts = (slice(first, first + _CHUNK) for first in range(0, len(mask), _CHUNK))
        return sum(int(np.multiply(self.lengths[part], mask[part]).sum(dtype=np.int64)) for part in parts)


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Some global samples and the pieces of pool rows that their tokens come from.

    Attributes:
        samples: int64[n], global sample numbers.
        generations: int64[n], the generation that serves each.
        first_piece: int64[n + 1], the pieces of sample i are ``first_piece[i]`` to ``first_piece[i + 1] - 1``.
        rows: int64[p], pool row of each piece.
        first_token: int64[p], where in its row the piece begins.
        num_tokens: int64[p], tokens of the piece.
    """

    samples: np.ndarray
    generations: np.ndarray
    first_piece: np.ndarray
    rows: np.ndarray
    first_token: np.ndarray
    num_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, start: int, stop: int) -> Contexts:
        """Samples number ``start`` to ``stop - 1`` of these."""
        first, last = self.first_piece[start], self.first_piece[stop]
        return Contexts(
            samples=self.samples[start:stop],
            generations=self.generations[start:stop],
            first_piece=self.first_piece[start : stop + 1] - first,
            rows=self.rows[first:last],
            first_token=self.first_token[first:last],
            num_tokens=self.num_tokens[first:last],
        )


def join_contexts(parts: Sequence[Contexts]) -> Contexts:
    """One after the other."""
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(len(part.rows) for part in parts)])
    starts = [part.first_piece[:-1] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
    columns = {
        name: np.concatenate([np.empty(0, dtype=np.int64), *(getattr(part, name) for part in parts)])
        for name in ("samples", "generations", "rows", "first_token", "num_tokens")
    }
    return Contexts(first_piece=np.concatenate([*starts, offsets[-1:]]), **columns)


def choose_packing(index: PoolIndex, packing: str, sequence_length: int) -> Packing:
    """How the pool's rows become training samples of ``sequence_length`` tokens and one more, the last target.

    Args:
        index: the pool.
        packing: ``none`` (a row is a sample) or ``documents``.
        sequence_length: of the model.

    Raises:
        UserError: rows have another length and are not to be packed, or the whole pool does not fill one context.
    """
    length = sequence_length + 1
    if packing == "documents":
        if index.num_tokens < length:
            raise UserError(
                f"the pool {index.directory} has {index.num_tokens} tokens, fewer than one training sequence of {length}; "
                "use a larger pool or a shorter sequence length"
            )
        return Packing(index.lengths, length)
    other = np.flatnonzero(index.lengths != length)
    if other.size:
        raise UserError(
            f"training sequences of {sequence_length} tokens need samples of {length} "
            f"tokens, but {other.size} of the {index.num_samples} samples of {index.directory} differ "
            f"(the first has {index.lengths[other[0]]}); set data.packing=documents, preprocess with --pack {length}, "
            "or set the sequence length to the pool's"
        )
    return Packing(index.lengths)


class DocumentStream:
    """The documents of one segment in its order, cut into contexts.

    Where documents begin in the stream is worked out as far as it was asked for, and one sum in 64 documents is kept: an
    eighth of a byte per document. A first look far into the stream of a large pool takes a tenth of a microsecond per
    document before it, every other one about a microsecond per context. Threads may share a stream.

    Args:
        documents: pool rows of the stream.
        ranks_at: (first, stop) -> int64[stop - first], ranks in ``documents`` of those at these positions of the stream.
        packing: with a context length.
    """

    def __init__(self, documents: RowSet, ranks_at: Callable[[int, int], np.ndarray], packing: Packing) -> None:
        assert packing.context_length is not None
        self._documents = documents
        self._ranks_at = ranks_at
        self._lengths = packing.lengths
        self._context_length = packing.context_length
        self._num_tokens = packing.num_tokens(documents.mask(len(packing.lengths)))
        self.num_contexts = self._num_tokens // packing.context_length
        self._before = np.zeros(1, dtype=np.int64)  # tokens before every _BLOCK-th document, and after the last one summed

    def pieces(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What contexts ``first`` to ``first + count - 1`` are made of: the last four arrays of :class:`Contexts`."""
        low, high = first * self._context_length, (first + count) * self._context_length
        cuts = np.arange(low, high + 1, self._context_length)
        _, rows, begins = self._covering(low, high)
        edges = np.unique(np.concatenate([begins[(begins > low) & (begins < high)], cuts]))
        document = np.searchsorted(begins, edges[:-1], side="right") - 1
        return np.searchsorted(edges, cuts), rows[document], edges[:-1] - begins[document], np.diff(edges)

    def num_begun(self, num_contexts: int) -> int:
        """How many documents, from the first on, the first ``num_contexts`` contexts hold at least a part of."""
        if num_contexts == 0:
            return 0
        stop = num_contexts * self._context_length
        first, _, begins = self._covering(stop - 1, stop)
        return first + int(np.searchsorted(begins, stop, side="left"))

    def _covering(self, low: int, high: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The documents that cover tokens ``low`` to ``high - 1`` of the stream, in whole blocks.

        Returns:
            Position of the first in the stream, rows int64[n], and int64[n], where in the stream each begins.
        """
        before = self._summed_up_to(high)
        block = int(np.searchsorted(before, low, side="right")) - 1
        last = int(np.searchsorted(before, high, side="left"))
        first = block * _BLOCK
        rows = self._documents.select(self._ranks_at(first, min(last * _BLOCK, self._documents.size)))
        lengths = self._lengths[rows].astype(np.int64)
        return first, rows, before[block] + np.cumsum(lengths) - lengths

    def _summed_up_to(self, token: int) -> np.ndarray:
        """The sums, reaching ``token`` at least."""
        before = self._before
        if before[-1] >= token:
            return before
        parts, total = [before], int(before[-1])
        document = (len(before) - 1) * _BLOCK
        far = (token - total) * self._documents.size > _FAR * self._num_tokens
        by_rank = self._lengths[self._documents.mask(len(self._lengths))] if far else None
        while total < token:
            ranks = self._ranks_at(document, min(document + _CHUNK, self._documents.size))
            assert ranks.size, "a context beyond the end of the stream"
            lengths = self._lengths[self._documents.select(ranks)] if by_rank is None else by_rank[ranks]
            sums = np.add.reduceat(lengths, np.arange(0, ranks.size, _BLOCK), dtype=np.int64)
            parts.append(total + np.cumsum(sums))
            total = int(parts[-1][-1])
            document += ranks.size
        # Replaced whole: a thread that lengthens the sums at the same time finds the same numbers.
        self._before = np.concatenate(parts)
        return self._before
