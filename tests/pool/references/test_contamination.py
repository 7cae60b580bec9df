"""n-grams shared with references: the fast search finds exactly what a Python set finds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.references import contamination
from megatron_groupmates.pool.references.contamination import MIN_NGRAM, ReferenceNgrams

Samples = list[np.ndarray]


def joined(samples: Samples, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([np.empty(0, dtype=dtype), *samples]).astype(dtype)
    return tokens, np.array([len(sample) for sample in samples], dtype=np.int64)


def ngrams_of(sample: np.ndarray, ngram: int) -> list[tuple[int, ...]]:
    values = sample.tolist()
    return [tuple(values[start : start + ngram]) for start in range(len(values) - ngram + 1)]


def found(references: Samples, samples: Samples, dtype: str, ngram: int, **sizes: Any) -> tuple[dict[tuple[int, tuple], int], dict]:
    """({(sample, n-gram): count}, {n-gram: examples}) by the fast search."""
    searched = ReferenceNgrams(*joined(references, dtype), ngram, **sizes)
    overlaps = searched.search(*joined(samples, dtype))
    content = [tuple(row) for row in searched.distinct.tolist()]
    counts = {
        (sample, content[number]): count
        for sample, number, count in zip(overlaps.sample.tolist(), overlaps.ngram.tolist(), overlaps.count.tolist(), strict=True)
    }
    assert len(counts) == len(overlaps.sample), "each (sample, n-gram) once"
    return counts, {content[number]: set(searched.examples_of(np.array([number])).tolist()) for number in range(searched.num_ngrams)}


def expected(references: Samples, samples: Samples, ngram: int) -> tuple[dict[tuple[int, tuple], int], dict]:
    """The same by the definition."""
    where: dict[tuple, set[int]] = {}
    for number, reference in enumerate(references):
        for gram in ngrams_of(reference, ngram):
            where.setdefault(gram, set()).add(number)
    counts = Counter((number, gram) for number, sample in enumerate(samples) for gram in ngrams_of(sample, ngram) if gram in where)
    return dict(counts), where


@st.composite
def cases(draw: st.DrawFn) -> tuple[Samples, Samples, str, int]:
    """Few distinct ids, so that n-grams repeat; passages of references copied to any place; samples of any length."""
    dtype = draw(st.sampled_from(["uint16", "uint32"]))
    ngram = draw(st.integers(MIN_NGRAM, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary = draw(st.integers(1, 5))
    largest = np.iinfo(dtype).max

    def texts(count: int) -> Samples:
        # Ids at both ends of the range: every bit of a word counts.
        return [largest - generator.integers(0, vocabulary, length) for length in generator.integers(0, 4 * ngram, count)]

    references, samples = texts(draw(st.integers(0, 5))), texts(draw(st.integers(0, 7)))
    for sample in samples:
        if references and draw(st.booleans()):
            source = references[generator.integers(len(references))]
            length = int(generator.integers(0, min(len(source), len(sample)) + 1))
            start, target = generator.integers(0, len(source) - length + 1), generator.integers(0, len(sample) - length + 1)
            sample[target : target + length] = source[start : start + length]
    return references, samples, dtype, ngram


@settings(deadline=None, max_examples=250)
@given(case=cases(), sizes=st.sampled_from([{}, {"table_bits": 3}, {"hash_bits": 1}, {"table_bits": 4, "hash_bits": 3}]))
def test_equals_the_definition_whatever_collides(case: tuple[Samples, Samples, str, int], sizes: dict[str, int]) -> None:
    references, samples, _, ngram = case
    assert found(*case, **sizes) == expected(references, samples, ngram)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("ngram", [7, 8, 10, 11, 13, 50])
def test_every_offset_across_blocks(monkeypatch: pytest.MonkeyPatch, dtype: str, ngram: int) -> None:
    """A single copied n-gram is found wherever it begins, also where two blocks of the search meet."""
    monkeypatch.setattr(contamination, "_BLOCK", 16)
    generator = np.random.default_rng(ngram)
    reference = generator.integers(0, 60_000, ngram)
    for start in range(180 - ngram + 1):
        sample = generator.integers(0, 60_000, 180)
        sample[start : start + ngram] = reference
        counts, _ = found([reference], [sample[:90], sample[90:]], dtype, ngram)
        inside = start + ngram <= 90 or start >= 90
        assert counts == ({(int(start >= 90), tuple(reference.tolist())): 1} if inside else {})


def test_no_ngram_lies_across_samples_or_examples() -> None:
    run = np.arange(20)
    assert found([run], [run[:7], run[7:]], "uint16", 13)[0] == {(1, tuple(range(7, 20))): 1}
    assert found([run[:7], run[7:19]], [run], "uint16", 13) == ({}, {})


@pytest.mark.parametrize("ngram", [1, MIN_NGRAM - 1])
def test_short_ngrams_are_refused(ngram: int) -> None:
    with pytest.raises(UserError, match=rf"n-grams of {ngram} tokens are everyday phrases; --ngram is at least 7"):
        ReferenceNgrams(np.arange(30, dtype=np.uint16), np.array([30]), ngram)
