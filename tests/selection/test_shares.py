"""Least shares of kinds of source, for a method that takes rows in a fixed order."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.selection.budget import take_in_order
from megatron_groupmates.selection.shares import Choice, Choose, check_source_shares, choose_with_shares

KINDS = ["web", "book", "code"]


def in_order(order: np.ndarray, lengths: np.ndarray) -> Choose:
    def choose(allowed: np.ndarray | None, budget: int) -> Choice:
        rows = take_in_order(order if allowed is None else order[allowed[order]], lengths, budget)
        return rows, rows.astype(float)

    return choose


def test_nothing_changes_where_no_kind_falls_short() -> None:
    kind_of, lengths = np.arange(30) % 3, np.full(30, 10)
    choose = in_order(np.arange(30), lengths)
    (rows, scores), facts = choose_with_shares(choose, kind_of, KINDS, {"web": 0.3, "code": 0.2}, lengths, 155)
    assert rows.tolist() == list(range(15)) and scores.tolist() == list(range(15))
    assert facts == [
        {"kind": "web", "minimum_tokens": 46, "selected_tokens": 50, "reserved": False},
        {"kind": "code", "minimum_tokens": 31, "selected_tokens": 50, "reserved": False},
    ]


def test_a_kind_that_falls_short_is_chosen_by_itself_and_may_push_another_below() -> None:
    # 10 of web, then 6 of book, then 10 of code; books get 3 of 10 until 4 are taken for code.
    kind_of, lengths = np.repeat([0, 1, 2], [7, 6, 10]), np.full(23, 10)
    choose = in_order(np.arange(23), lengths)
    (rows, _), facts = choose_with_shares(choose, kind_of, KINDS, {"book": 0.3, "code": 0.4}, lengths, 100)
    assert sorted(rows.tolist()) == [0, 1, 2, 7, 8, 9, 13, 14, 15, 16]
    assert rows[:3].tolist() == [0, 1, 2], "reserved kinds come last"
    assert [(fact["selected_tokens"], fact["reserved"]) for fact in facts] == [(30, True), (40, True)]


def test_a_kind_without_enough_samples_gets_all_it_has(caplog: pytest.LogCaptureFixture) -> None:
    kind_of, lengths = np.array([0] * 20 + [1] * 2), np.full(22, 10)
    with caplog.at_level(logging.WARNING):
        (rows, _), [fact] = choose_with_shares(in_order(np.arange(22), lengths), kind_of, KINDS, {"book": 0.5}, lengths, 100)
    assert sorted(rows.tolist()) == [*range(8), 20, 21]
    assert (fact["minimum_tokens"], fact["selected_tokens"]) == (50, 20)
    assert "book has 20 tokens left where its share is 50; it gets all of them" in caplog.text


def test_the_whole_budget_may_be_shared_out() -> None:
    kind_of, lengths = np.array([0] * 9 + [1] * 9 + [2] * 9), np.full(27, 10)
    (rows, _), _ = choose_with_shares(in_order(np.arange(27), lengths), kind_of, KINDS, {"book": 0.5, "code": 0.5}, lengths, 100)
    assert sorted(rows.tolist()) == [*range(9, 14), *range(18, 23)]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    used=st.sets(st.sampled_from(KINDS)),
    budget=st.integers(1, 900),
)
def test_budget_and_shares_are_met_to_within_a_sample(seed: int, shares: list[float], used: set[str], budget: int) -> None:
    rng = np.random.default_rng(seed)
    kind_of, lengths = rng.integers(-1, 3, 40), rng.integers(1, 30, 40)
    minimum = {kind: share / max(1.0, sum(shares)) * 0.999 for kind, share in zip(KINDS, shares, strict=False) if kind in used}
    (rows, _), facts = choose_with_shares(in_order(rng.permutation(40), lengths), kind_of, KINDS, minimum, lengths, budget)
    assert len(np.unique(rows)) == len(rows)
    tokens = int(lengths[rows].sum())
    assert tokens <= budget
    assert len(rows) == 40 or budget - tokens < lengths.max()
    for fact in facts:
        own = kind_of == KINDS.index(fact["kind"])
        assert fact["selected_tokens"] == lengths[rows[own[rows]]].sum()
        assert fact["selected_tokens"] > min(fact["minimum_tokens"], lengths[own].sum()) - lengths.max()


def test_bad_shares_are_named() -> None:
    for shares, message in (
        ({"code": 0.7, "web": 0.4}, r"the shares sum to 1\.1, above the whole budget; lower them to 1 at most"),
        ({"wep": 0.1}, r"the pool has no kind of source 'wep'; did you mean web\?"),
        ({"arxiv": 0.1}, "the pool has no kind of source 'arxiv'; it has web, book, code"),
        ({"web": -0.1}, r"web: -0\.1 is not a share of the budget"),
    ):
        with pytest.raises(UserError, match=message):
            check_source_shares(shares, KINDS)
    with pytest.raises(UserError, match="no kind of source 'web'; it has none"):
        check_source_shares({"web": 0.1}, [])
