"""Quotas add up, equal shares meet the budget to within one sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.selection.budget import cluster_quotas, take_equal_shares, take_in_order


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 10**13), min_size=1, max_size=20), budget=st.integers(1, 10**14))
def test_quotas_sum_to_the_budget_and_stay_within_one_token_of_the_share(tokens: list[int], budget: int) -> None:
    quotas = cluster_quotas(np.array(tokens), budget).tolist()
    total = sum(tokens)
    assert sum(quotas) == min(budget, total)
    assert all(quota <= size for quota, size in zip(quotas, tokens, strict=True))
    if budget < total:
        assert all(abs(quota * total - size * budget) < total for quota, size in zip(quotas, tokens, strict=True))


def test_largest_remainders_get_what_is_left_over() -> None:
    assert cluster_quotas(np.array([3, 3, 4]), 5).tolist() == [2, 1, 2]
    assert cluster_quotas(np.array([10, 29, 61]), 10).tolist() == [1, 3, 6]


@settings(deadline=None)
@given(data=st.data(), num_clusters=st.integers(1, 6), budget=st.integers(1, 800))
def test_equal_shares_meet_the_budget_to_within_one_sample(data: st.DataObject, num_clusters: int, budget: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, 40), min_size=num_clusters, max_size=40)))
    clusters = np.arange(len(lengths)) % num_clusters
    members = [np.flatnonzero(clusters == cluster) for cluster in range(num_clusters)]
    tokens = np.array([lengths[rows].sum() for rows in members])
    quotas = cluster_quotas(tokens, budget)
    counts = take_equal_shares((lengths[rows] for rows in members), quotas, budget)
    assert counts.dtype == np.int64
    # Only what a cluster offers up to the first that does not fit its quota matters.
    asked = [rows[: 1 + np.searchsorted(lengths[rows].cumsum(), quota, side="right")] for rows, quota in zip(members, quotas, strict=True)]
    np.testing.assert_array_equal(take_equal_shares((lengths[rows] for rows in asked), quotas, budget), counts)
    taken = [rows[:count] for rows, count in zip(members, counts, strict=True)]
    used = sum(int(lengths[part].sum()) for part in taken)
    assert used <= budget
    left_out = [int(lengths[rows[len(part)]]) for rows, part in zip(members, taken, strict=True) if len(part) < len(rows)]
    if budget >= lengths.sum():
        assert not left_out
    else:
        assert budget - used < max(left_out)
    for part, quota in zip(taken, quotas, strict=True):
        assert lengths[part[:-1]].sum() <= quota


def test_samples_of_one_length_are_apportioned_by_largest_remainder() -> None:
    """Floor of half of each of 5, 5 and 7 would be 7 samples; half of all 17 is 8."""
    lengths = [np.full(size, 100) for size in (5, 5, 7)]
    assert take_equal_shares(lengths, cluster_quotas(np.array([500, 500, 700]), 850), 850).tolist() == [3, 2, 3]


def test_take_in_order_stops_at_the_first_that_does_not_fit() -> None:
    lengths = np.array([5, 1, 10, 1])
    assert take_in_order(np.array([0, 2, 1, 3]), lengths, 14).tolist() == [0]
    assert take_in_order(np.array([0, 2, 1, 3]), lengths, 15).tolist() == [0, 2]
    assert take_in_order(np.array([3, 0]), lengths, 100).tolist() == [3, 0]


def test_empty_budget_is_refused() -> None:
    with pytest.raises(UserError, match="the token budget is 0; it must be at least 1"):
        take_in_order(np.array([0]), np.array([1]), 0)
    with pytest.raises(UserError, match="the token budget is -3"):
        cluster_quotas(np.array([1]), -3)
