"""Packed sets of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool.rowset import RowSet, count_rows, pack_rows


def masks(largest: int = 700) -> st.SearchStrategy[np.ndarray]:
    return st.builds(
        lambda size, density, seed: np.random.default_rng(seed).random(size) < density,
        st.integers(1, largest),
        st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
        st.integers(0, 10**6),
    )


@given(mask=masks(), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=150)
def test_equals_a_list_of_the_rows(mask: np.ndarray, seed: int) -> None:
    rows = np.flatnonzero(mask)
    packed = RowSet(pack_rows(mask))
    assert packed.size == count_rows(packed.bits) == len(rows)
    assert np.array_equal(packed.mask(len(mask)), mask)
    ranks = np.random.default_rng(seed).integers(0, len(rows), 50) if len(rows) else np.empty(0, dtype=np.int64)
    selected = packed.select(ranks)
    assert selected.dtype == np.int64 and np.array_equal(selected, rows[ranks])
    assert np.array_equal(packed.select(np.arange(len(rows))), rows)
    few = [packed.select(ranks[first : first + 3]) for first in range(0, len(ranks), 3)]
    assert all(part.dtype == np.int64 for part in few) and [row for part in few for row in part] == rows[ranks].tolist()


@given(mask=masks(), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_subset(mask: np.ndarray, seed: int) -> None:
    rows = np.flatnonzero(mask)
    flags = np.random.default_rng(seed).random(len(rows)) < 0.5
    expected = np.zeros_like(mask)
    expected[rows[flags]] = True
    assert np.array_equal(RowSet(pack_rows(mask)).subset(flags), pack_rows(expected))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1 << 14, (1 << 15) + 1])
def test_borders(size: int) -> None:
    whole = RowSet(pack_rows(np.ones(size, dtype=bool)))
    assert len(whole.bits) % 8 == 0
    assert np.array_equal(whole.select(np.arange(size)), np.arange(size))
    assert RowSet(pack_rows(np.zeros(size, dtype=bool))).size == 0
