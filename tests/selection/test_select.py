"""One selection end to end: candidates, budget, methods, recipes and their reports."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection.baselines import individual_order, random_order
from megatron_groupmates.selection.greedy import greedy_select
from megatron_groupmates.selection.select import SelectionRecipe, select_rows

RNG = np.random.default_rng(0)
EMBEDDINGS = RNG.standard_normal((400, 8)).astype(np.float32)
EMBEDDINGS /= np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)
POOL: dict[str, Any] = {
    "embeddings": EMBEDDINGS,
    "individual": RNG.standard_normal(400),
    "lengths": RNG.integers(10, 100, 400),
    "reference_embeddings": RNG.standard_normal((6, 8)),
    "relation": Relation(alpha=0.9, tau=0.8),
}
MASK = RNG.random(400) < 0.7
RECIPES = [
    SelectionRecipe(share_per_cluster=share, num_clusters=number, kmeans_iterations=5)
    for share in ("equal", "global")
    for number in (None, 5)
]


@pytest.mark.parametrize("method", ["group", "individual", "random", "similarity"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_meets_the_budget_with_candidates_only(method: str, recipe: SelectionRecipe) -> None:
    budget = int(POOL["lengths"][MASK].sum()) // 2
    result = select_rows(method, candidates=MASK, budget_tokens=budget, seed=4, recipe=recipe, **POOL)
    assert result.rows.dtype == result.order.dtype == np.int64
    assert MASK[result.rows].all()
    assert len(np.unique(result.order)) == len(result.order)
    np.testing.assert_array_equal(result.rows, np.sort(result.order))
    tokens = int(POOL["lengths"][result.rows].sum())
    assert budget - 100 < tokens <= budget
    assert result.report["selected_tokens"] == tokens
    assert result.report["candidates"] == MASK.sum()
    assert result.report["selected"] == len(result.rows)
    assert json.loads(json.dumps(result.report)) == result.report
    again = select_rows(method, candidates=np.flatnonzero(MASK)[::-1], budget_tokens=budget, seed=4, recipe=recipe, **POOL)
    np.testing.assert_array_equal(again.order, result.order)


def test_group_in_one_cluster_is_the_greedy_order() -> None:
    rows = np.flatnonzero(MASK)
    expected = rows[greedy_select(POOL["embeddings"][rows], POOL["individual"][rows], 60, 0.9, 0.8)]
    budget = int(POOL["lengths"][expected].sum())
    for share in ("equal", "global"):
        recipe = SelectionRecipe(share_per_cluster=share, num_clusters=1)
        result = select_rows("group", candidates=MASK, budget_tokens=budget, seed=0, recipe=recipe, **POOL)
        np.testing.assert_array_equal(result.order, expected)


def test_equal_shares_take_half_of_each_cluster() -> None:
    lengths = np.full(400, 7)
    result = select_rows(
        "group",
        candidates=np.ones(400, bool),
        budget_tokens=1400,
        seed=0,
        recipe=SelectionRecipe(share_per_cluster="equal", num_clusters=6, kmeans_iterations=5),
        **{**POOL, "lengths": lengths},
    )
    sizes, chosen = np.array(result.report["cluster_sizes"]), np.array(result.report["cluster_selected"])
    assert sizes.sum() == 400 and chosen.sum() == 200
    assert (np.abs(chosen - sizes / 2) < 1).all()


def test_baselines_take_a_prefix_of_their_order() -> None:
    rows, lengths = np.flatnonzero(MASK), np.full(400, 10)
    settings = {"candidates": MASK, "budget_tokens": 205, "seed": 9, "lengths": lengths}
    warm = SelectionRecipe(gumbel_temperature=0.5)
    individual = POOL["individual"]
    np.testing.assert_array_equal(select_rows("random", **settings).order, rows[random_order(len(rows), 9)[:20]])
    np.testing.assert_array_equal(
        select_rows("individual", individual=individual, **settings).order, rows[individual_order(individual[rows])[:20]]
    )
    np.testing.assert_array_equal(
        select_rows("individual", individual=individual, recipe=warm, **settings).order,
        rows[individual_order(individual[rows], 0.5, 9)[:20]],
    )


@pytest.mark.parametrize("method", ["group", "individual", "random", "similarity"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_budget_above_the_candidates_takes_them_all(method: str, recipe: SelectionRecipe) -> None:
    result = select_rows(method, candidates=MASK, budget_tokens=10**9, seed=0, recipe=recipe, **POOL)
    np.testing.assert_array_equal(result.rows, np.flatnonzero(MASK))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("best", {}, "selection method is 'best'; choose one of group, individual, random, similarity"),
        ("group", {"individual": None, "relation": None}, "method group needs individual and relation"),
        ("similarity", {"reference_embeddings": None}, "method similarity needs reference_embeddings"),
        ("random", {"candidates": np.zeros(400, bool)}, "there are no candidates: training has consumed the whole pool"),
        ("random", {"candidates": np.array([3, 400])}, "rows reach from 3 to 400 but the pool has 400"),
        ("random", {"candidates": np.ones(9, bool)}, r"mask of candidates has shape \[9\] but the pool 400"),
        ("random", {"budget_tokens": 0}, "the token budget is 0"),
    ],
)
def test_bad_input_is_named(method: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_rows(method, **{**POOL, "candidates": MASK, "budget_tokens": 100, "seed": 0, **change})


def test_recipe_is_checked() -> None:
    with pytest.raises(UserError, match="share_per_cluster is 'half'; choose one of equal, global"):
        SelectionRecipe(share_per_cluster="half")
