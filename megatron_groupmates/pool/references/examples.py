"""Held-out examples and which of their tokens are scored.

A held-out set is a pool of one of two sorts:

- a *pool of contexts*, as ``tools/preprocess_dclm.py --pack`` writes it: every sample has the model's sequence length plus
  one token, and every token but the first is scored;
- a *reference set*, as ``tools/make_reference.py`` writes it: samples of any length up to that, and beside them
  ``scored.bin``, one bit per token of the set in pool order (``np.packbits`` order), 1 where the token enters the loss. Its
  SHA-256 is ``made_by.scored_sha256`` in ``pool.json``. A sample's first token is never scored: nothing predicts it.

Batches of examples of several lengths are filled up at their ends with the end-of-text token, which is not scored. With
causal attention it changes nothing before it, so that the loss does not depend on which examples share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import POOL_FILE, PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.utils.files import sha256_bytes, sha256_json
from megatron_groupmates.utils.storage import join, read_all

SCORED_FILE = "scored.bin"
SCORED_DIGEST = "scored_sha256"


def pack_scored(masks: Sequence[np.ndarray]) -> bytes:
    """Content of ``scored.bin`` for the scored tokens bool[length] of each sample, in pool order."""
    assert not any(mask[0] for mask in masks), "nothing predicts a sample's first token"
    return np.packbits(np.concatenate(masks)).tobytes()


def is_reference_set(index: PoolIndex) -> bool:
    """Whether the pool says which of its tokens are scored."""
    return SCORED_DIGEST in index.facts["made_by"]


def held_out_fingerprint(index: PoolIndex) -> str:
    """What identifies a held-out set: the pool's fingerprint, and for a reference set also which tokens are scored."""
    if not is_reference_set(index):
        return index.fingerprint
    return sha256_json([index.fingerprint, index.facts["made_by"][SCORED_DIGEST]])


class ScoredTokens:
    """Which tokens of a held-out set enter the loss.

    Raises:
        UserError: the file that says so is missing or damaged.
    """

    def __init__(self, index: PoolIndex) -> None:
        self._lengths = index.lengths
        self._bits: np.ndarray | None = None
        if is_reference_set(index):
            self._bits = np.frombuffer(_read_bits(index), dtype=np.uint8)
            self._stops = np.cumsum(index.lengths, dtype=np.int64)

    def read(self, row: int) -> np.ndarray:
        """bool[length] of the sample at pool row ``row``; all but the first token where the pool does not say."""
        length = int(self._lengths[row])
        if self._bits is None:
            return np.arange(length) > 0
        first = int(self._stops[row]) - length
        start, skipped = divmod(first, 8)
        content = self._bits[start : (first + length + 7) // 8]
        return np.unpackbits(content, count=skipped + length)[skipped:].view(bool)


def _read_bits(index: PoolIndex) -> bytes:
    path, expected = join(index.directory, SCORED_FILE), index.facts["made_by"][SCORED_DIGEST]
    try:
        content = read_all(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, which says which tokens of the reference set are scored; make the set again") from None
    if sha256_bytes(content) != expected:
        raise UserError(f"{path} is damaged: SHA-256 {sha256_bytes(content)}, {POOL_FILE} says {expected}; make the reference set again")
    return content


class HeldOutExamples:
    """The examples of a held-out set, checked against the model's sequence length.

    Attributes:
        index: the held-out pool.

    Raises:
        UserError: an example does not fit the sequence length, or which tokens are scored cannot be read.
    """

    def __init__(self, index: PoolIndex, sequence_length: int) -> None:
        _check_lengths(index, sequence_length)
        self.index = index
        self._reader = PoolReader(index)
        self._scored = ScoredTokens(index)

    def batch(self, rows: Sequence[int] | np.ndarray, ignored_label: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and the labels they predict, both int64[len(rows), length of the longest - 1].

        Labels are ``ignored_label`` where a token is not scored.
        """
        length = int(self.index.lengths[np.asarray(rows)].max()) - 1
        tokens = np.full((len(rows), length), self.index.eot_id, dtype=np.int64)
        labels = np.full((len(rows), length), ignored_label, dtype=np.int64)
        for number, row in enumerate(rows):
            sample, scored = self._reader.read(int(row)), self._scored.read(int(row))
            tokens[number, : len(sample) - 1] = sample[:-1]
            labels[number, : len(sample) - 1] = np.where(scored[1:], sample[1:], ignored_label)
        return tokens, labels


def _check_lengths(index: PoolIndex, sequence_length: int) -> None:
    longest = sequence_length + 1
    if is_reference_set(index):
        other = np.flatnonzero((index.lengths > longest) | (index.lengths < 2))
        wanted, remedy = f"2 to {longest}", f"make the set again with --max-tokens {longest}"
    else:
        other = np.flatnonzero(index.lengths != longest)
        wanted = str(longest)
        remedy = f"preprocess with --pack {longest}, make a reference set with tools/make_reference.py"
    if other.size:
        raise UserError(
            f"sequences of {sequence_length} tokens need samples of {wanted} tokens, but {other.size} of the {index.num_samples} "
            f"samples of {index.directory} differ (the first has {index.lengths[other[0]]}); {remedy}, or set the sequence length to the "
            "pool's"
        )
