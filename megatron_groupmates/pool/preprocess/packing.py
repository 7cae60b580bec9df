"""Documents to samples: one each, or packed contexts of a fixed length."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SampleBlock:
    """Consecutive samples and what they are made of.

    Attributes:
        tokens: ids of all samples, one after the other.
        lengths: int32[num_samples].
        main_document: int64[num_samples], number of the document with most tokens in the sample; the first of equals.
        parts_per_sample: int64[num_samples], how many of the parts belong to each sample.
        part_document: int64[num_parts], number of the document, samples in order.
        part_first_token: int64[num_parts], where in that document the part begins.
        part_num_tokens: int64[num_parts].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    main_document: np.ndarray
    parts_per_sample: np.ndarray
    part_document: np.ndarray
    part_first_token: np.ndarray
    part_num_tokens: np.ndarray


def one_per_document(tokens: np.ndarray, lengths: np.ndarray, first_document: int) -> SampleBlock:
    """Each document is a sample.

    Args:
        tokens: ids of the documents, one after the other.
        lengths: int64[num_documents].
        first_document: number of the first; the others follow.
    """
    documents = first_document + np.arange(len(lengths))
    return SampleBlock(
        tokens,
        lengths.astype(np.int32),
        documents,
        np.ones(len(lengths), dtype=np.int64),
        documents,
        np.zeros(len(lengths), dtype=np.int64),
        lengths,
    )


class Packer:
    """DCLM's packing: the documents of a file, one after the other, cut into contexts of ``length`` tokens.

    Contexts do not overlap. A tail shorter than a context is dropped: filled up with padding, it would be trained on.
    """

    def __init__(self, length: int, dtype: str) -> None:
        self._length = length
        self._no_tokens = np.empty(0, dtype=dtype)
        self.drop_tail()

    def drop_tail(self) -> int:
        """End a file: forget what is left of it. Returns the number of tokens dropped."""
        num_dropped = len(getattr(self, "_tokens", ()))
        self._tokens = self._no_tokens
        self._documents = self._first_tokens = self._num_tokens = np.empty(0, dtype=np.int64)
        return num_dropped

    @property
    def first_pending(self) -> int | None:
        """Number of the first document of which a later context may have a part; None where there is none."""
        return int(self._documents[0]) if len(self._documents) else None

    def add(self, tokens: np.ndarray, lengths: np.ndarray, first_document: int) -> SampleBlock:
        """The contexts that are full after these documents; arguments as :func:`one_per_document`, lengths above 0."""
        tokens = np.concatenate([self._tokens, tokens])
        documents = np.concatenate([self._documents, first_document + np.arange(len(lengths))])
        first_tokens = np.concatenate([self._first_tokens, np.zeros(len(lengths), dtype=np.int64)])
        num_tokens = np.concatenate([self._num_tokens, lengths])
        starts = np.cumsum(num_tokens) - num_tokens
        num_contexts = len(tokens) // self._length

        # Parts: the documents, cut again at the borders of contexts.
        borders = np.arange(num_contexts + 1) * self._length
        part_starts = np.union1d(starts, borders[borders < len(tokens)])
        part_num_tokens = np.diff(part_starts, append=len(tokens))
        source = np.searchsorted(starts, part_starts, side="right") - 1
        part_document = documents[source]
        part_first_token = first_tokens[source] + part_starts - starts[source]
        context = part_starts // self._length

        full = int(np.searchsorted(context, num_contexts))
        end = num_contexts * self._length
        self._tokens = tokens[end:].copy()
        self._documents, self._first_tokens = part_document[full:], part_first_token[full:]
        self._num_tokens = part_num_tokens[full:]

        largest_first = np.lexsort((-part_num_tokens[:full], context[:full]))
        _, first_of_context = np.unique(context[:full], return_index=True)
        return SampleBlock(
            tokens=tokens[:end],
            lengths=np.full(num_contexts, self._length, dtype=np.int32),
            main_document=part_document[:full][largest_first][first_of_context],
            parts_per_sample=np.bincount(context[:full], minlength=num_contexts).astype(np.int64),
            part_document=part_document[:full],
            part_first_token=part_first_token[:full],
            part_num_tokens=part_num_tokens[:full],
        )
