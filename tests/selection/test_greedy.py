"""Lazy greedy selection against the plain loop, for every input we can think of, and against stored picks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection import greedy, greedy_block, greedy_crowd, greedy_pool, greedy_state
from megatron_groupmates.selection.greedy import (
    greedy_batches,
    greedy_select,
    greedy_select_related,
    greedy_sequence,
)

DATA = Path(__file__).parent.parent / "data"


def plain_greedy(embeddings: np.ndarray, individual: np.ndarray, num_select: int, relation: Relation) -> list[tuple[int, float]]:
    """Every score at every step; rows one by one, so that equal rows score bitwise alike."""
    rows, individual = np.ascontiguousarray(embeddings, np.float64), np.asarray(individual, np.float64)
    total, taken = np.zeros(rows.shape[1]), []
    for step in range(num_select):
        scores = relation.scores(individual, np.vecdot(rows, total / step)) if step else individual.copy()
        scores[[index for index, _ in taken]] = np.inf
        chosen = int(scores.argmin())
        taken.append((chosen, float(scores[chosen])))
        total += rows[chosen]
    return taken


def make_case(seed: int, size: int, dim: int, kind: str, values: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((size, dim))
    if kind == "tight":
        embeddings = embeddings * 0.1 + rng.standard_normal(dim)
    if kind != "long":
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    individual = {
        "normal": rng.standard_normal(size),
        "negative": -rng.random(size),
        "positive": rng.random(size),
        "constant": np.full(size, -0.3),
        "zero": np.zeros(size),
        "rounded": np.round(rng.standard_normal(size)),
        "nearly constant": -1 + 1e-4 * rng.standard_normal(size),
        "heavy tails": rng.standard_cauchy(size),
        "tiny": 1e-30 * rng.standard_normal(size),
    }[values]
    if kind == "duplicates" and size:
        copies = rng.integers(0, -(-size // 4), size)
        embeddings, individual = embeddings[copies], individual[copies]
    return embeddings.astype(dtype), individual


cases = st.builds(
    make_case,
    seed=st.integers(0, 10**6),
    size=st.one_of(st.integers(0, 3), st.integers(4, 90)),
    dim=st.sampled_from([1, 2, 7, 33]),
    kind=st.sampled_from(["random", "tight", "long", "duplicates"]),
    values=st.sampled_from(["normal", "negative", "positive", "constant", "zero", "rounded", "nearly constant", "heavy tails", "tiny"]),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
relations = st.one_of(
    st.builds(Relation, alpha=st.floats(-2, 2), tau=st.one_of(st.floats(0.3, 2), st.floats(-2, -0.3))),
    st.builds(Relation, kind=st.just("additive"), gamma=st.floats(-2, 2), offset=st.floats(-1, 1)),
    st.just(Relation(kind="none")),
)


def force(patch: pytest.MonkeyPatch, way: str) -> None:
    """Make small inputs go the ways of large ones."""
    if way != "as is":
        patch.setattr(greedy_pool, "_LARGEST_POOL", 24)
        patch.setattr(greedy_pool, "_SMALLEST_BLOCK", 3)
        patch.setattr(greedy_pool, "_LARGEST_BLOCK", 8)
        patch.setattr(greedy_state, "_CHUNK", 16)
        patch.setattr(greedy_state, "_LARGEST_COPY", 0)
    if way.startswith("crowd"):
        patch.setattr(greedy, "_COST_OF_CROWD", -1e12)
        patch.setattr(greedy, "_COST_OF_BLOCK", -1e12)
        patch.setattr(greedy, "_COST_TO_START", 0.0)
        patch.setattr(greedy_crowd, "_AT_A_TIME", 3)
        patch.setattr(greedy_crowd, "_KEPT_PRODUCTS", 10)
        patch.setattr(greedy_crowd, "_CHUNK", 16)
        patch.setattr(greedy_crowd, "has_fast_bfloat16", lambda: way == "crowd in bfloat16")


WAYS = ["as is", "small blocks", "crowd in bfloat16", "crowd in float32"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=120)
@given(case=cases, relation=relations)
def test_equals_the_plain_loop(way: str, case: tuple[np.ndarray, np.ndarray], relation: Relation) -> None:
    embeddings, individual = case
    with pytest.MonkeyPatch.context() as patch:
        force(patch, way)
        found = list(greedy_sequence(embeddings, individual, relation))
    assert found == plain_greedy(embeddings, individual, len(individual), relation)


@pytest.mark.parametrize("values", ["normal", "negative", "nearly constant", "rounded", "constant"])
@pytest.mark.parametrize("kind", ["random", "tight", "duplicates"])
def test_equals_the_plain_loop_at_size(values: str, kind: str) -> None:
    embeddings, individual = make_case(1, 1500, 48, kind, values, "float32")
    relation = Relation(alpha=0.9, tau=0.7)
    expected = [index for index, _ in plain_greedy(embeddings, individual, 750, relation)]
    assert greedy_select(embeddings, individual, 750, 0.9, 0.7).tolist() == expected


def record(patch: pytest.MonkeyPatch, owner: type, name: str, count: Callable[..., int]) -> list[int]:
    """What ``count`` makes of the arguments of each call of a method."""
    counts: list[int] = []
    method = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *rest: (counts.append(count(self, *rest)), method(self, *rest))[1])
    return counts


def test_blocks_save_work(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, individual = make_case(2, 1500, 48, "random", "normal", "float32")
    products = record(monkeypatch, greedy_block.Block, "run", lambda block, *_: len(block.candidates) ** 2)
    passes = record(monkeypatch, greedy_state.GreedyState, "floor_of", lambda _, candidates, rows, *__: len(rows))
    greedy_select(embeddings, individual, 750, 1.0, 1.0)
    assert sum(products) + sum(passes) < 0.5 * 1500 * 750


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_crowd_saves_work(bfloat16: bool, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant influences: any candidate may be next, yet few are scored exactly, however tight the cluster."""
    monkeypatch.setattr(greedy_crowd, "has_fast_bfloat16", lambda: bfloat16)
    embeddings, individual = make_case(2, 1500, 96, "random", "constant", "float32")
    embeddings = (spread * embeddings + embeddings[:1]).astype(np.float32)
    exact = record(monkeypatch, greedy_crowd.Crowd, "_exact", lambda _, positions, __: len(positions))
    in_crowd = record(monkeypatch, greedy_crowd.Crowd, "run", lambda _, most: most)
    found = greedy_select_related(embeddings, individual, 750, Relation())
    assert found.tolist() == [index for index, _ in plain_greedy(embeddings, individual, 750, Relation())]
    assert sum(in_crowd) > 500
    assert sum(exact) < 20 * sum(in_crowd)


@settings(deadline=None, max_examples=60)
@given(case=cases, relation=relations, bfloat16=st.booleans())
def test_scores_of_the_crowd_are_within_their_bounds(case: tuple[np.ndarray, np.ndarray], relation: Relation, bfloat16: bool) -> None:
    embeddings, individual = case
    if len(individual) < 4:
        return
    state = greedy_state.GreedyState(embeddings, individual, relation)
    state.add(int(individual.argmin()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_crowd, "has_fast_bfloat16", lambda: bfloat16)
        crowd = greedy_crowd.Crowd(state)
    for _ in range(state.num_left if crowd.usable else 0):
        crowd.run(1)
        left = np.flatnonzero(state.available[crowd.candidates])
        candidates = crowd.candidates[left]
        exact = state.num_taken * state.exact(state.wide(candidates), individual[candidates], state.mean())
        doubt = crowd.error * crowd.slope[left] + 2 * crowd.rounding * state.num_taken
        assert (crowd.scores[left] - doubt <= exact).all()
        # The product's own rounding, up to 2 ** -8 of each product, is on the lower side only.
        assert bfloat16 or (crowd.scores[left] + doubt >= exact).all()


def test_equal_samples_are_followed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, individual = make_case(3, 20, 16, "random", "normal", "float16")
    copies = np.random.default_rng(0).integers(0, 20, 1200)
    products = record(monkeypatch, greedy_block.Block, "run", lambda block, *_: len(block.candidates))
    found = [index for index, _ in greedy_sequence(embeddings[copies], individual[copies], Relation())]
    assert found == [index for index, _ in plain_greedy(embeddings[copies], individual[copies], 1200, Relation())]
    assert max(products) <= 20


def test_batches_are_the_sequence() -> None:
    embeddings, individual = make_case(4, 700, 16, "duplicates", "nearly constant", "float32")
    batches = list(greedy_batches(embeddings, individual, Relation()))
    assert all(indices.dtype == np.int64 and scores.dtype == np.float64 and len(indices) == len(scores) for indices, scores in batches)
    pairs = [pair for indices, scores in batches for pair in zip(indices.tolist(), scores.tolist(), strict=True)]
    assert pairs == list(greedy_sequence(embeddings, individual, Relation()))


def test_order_is_the_one_of_a_hand_computed_example() -> None:
    """Two near copies and one different sample: the copy loses most of its value once the first is taken."""
    embeddings = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    individual = np.array([-1.0, -0.9, -0.5])
    assert greedy_select(embeddings, individual, 3, 1.0, 1.0).tolist() == [0, 2, 1]
    found = list(greedy_sequence(embeddings, individual, Relation(tau=2.0)))
    assert found == [(0, -1.0), (2, -0.5), (1, -0.9 * (1 - 0.5 / 2))]


def test_lowest_index_wins_ties() -> None:
    assert greedy_select(np.ones((5, 2)), np.full(5, -1.0), 5, 1.0, 3.0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_small_sizes_and_quotas(size: int) -> None:
    embeddings, individual = np.eye(3)[:size], -np.arange(size, dtype=float)
    for num_select in range(size + 1):
        picks = greedy_select(embeddings, individual, num_select, 1.0, 1.0)
        assert picks.dtype == np.int64 and picks.tolist() == list(range(size))[::-1][:num_select]


def test_parity_with_reference_picks() -> None:
    """One rank of tolerance where float64 scores tie within 1e-9."""
    golden = np.load(DATA / "greedy_small.npz")
    offset = 0
    for cluster in np.unique(golden["cluster"]):
        rows = np.flatnonzero(golden["cluster"] == cluster)
        quota = int(float(golden["ratio"]) * len(rows))
        embeddings, individual = golden["embedding"][rows], golden["prediction"][rows]
        found = rows[greedy_select(embeddings, individual, quota, 1.0, 1.0)]
        expected = golden["selected"][offset : offset + quota]
        offset += quota
        scores = [score for _, score in plain_greedy(embeddings, individual, quota, Relation())]
        for position in np.flatnonzero(found != expected):
            neighbour = position + 1 if found[position] == expected[min(position + 1, quota - 1)] else position - 1
            assert found[position] == expected[neighbour]
            assert abs(scores[position] - scores[neighbour]) < 1e-9
    assert offset == len(golden["selected"])


def test_single_precision_overflow_and_extreme_values() -> None:
    rng = np.random.default_rng(0)
    embeddings = (rng.standard_normal((40, 4)) * 1e25).astype(np.float32)
    individual = rng.standard_normal(40)
    expected = [index for index, _ in plain_greedy(embeddings, individual, 40, Relation())]
    assert greedy_select(embeddings, individual, 40, 1.0, 1.0).tolist() == expected


def test_bad_input_is_named() -> None:
    embeddings, individual = np.eye(3), np.zeros(3)
    with pytest.raises(UserError, match="num_select is 4 but there are 3 samples"):
        greedy_select(embeddings, individual, 4, 1.0, 1.0)
    with pytest.raises(UserError, match=r"shape \[3, 3\] and individual \[2\]"):
        greedy_select(embeddings, individual[:2], 1, 1.0, 1.0)
    with pytest.raises(UserError, match="individual influence is nan"):
        greedy_select(embeddings, np.array([0.0, np.nan, 1.0]), 1, 1.0, 1.0)
    with pytest.raises(UserError, match="individual influence is inf"):
        greedy_select(np.full((3, 3), -np.inf), individual, 1, 1.0, 1.0)
    with pytest.raises(UserError, match="individual influence is nan"):
        greedy_select(np.full((3, 3), np.nan, np.float32), individual, 1, 1.0, 1.0)
    with pytest.raises(UserError, match="tau not zero"):
        greedy_select(embeddings, individual, 1, 1.0, 0.0)


def test_no_relation_is_the_order_of_influences() -> None:
    individual = np.array([0.5, -1.0, 0.0, -1.0])
    assert greedy_select_related(np.eye(4), individual, 4, Relation(kind="none")).tolist() == [1, 3, 2, 0]
