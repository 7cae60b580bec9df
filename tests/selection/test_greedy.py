"""Lazy greedy selection against the plain loop, for every input we can think of, and against stored picks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection import greedy
from megatron_groupmates.selection.greedy import (
    greedy_global,
    greedy_select,
    greedy_select_related,
    greedy_sequence,
    members_of_clusters,
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


@pytest.mark.parametrize("shortlist_from", [8, 10**9])
@settings(deadline=None, max_examples=250)
@given(case=cases, relation=relations)
def test_equals_the_plain_loop(shortlist_from: int, case: tuple[np.ndarray, np.ndarray], relation: Relation) -> None:
    embeddings, individual = case
    with pytest.MonkeyPatch.context() as patch:
        # Small inputs must go through the shortlist too.
        patch.setattr(greedy, "_SHORTLIST_FROM", shortlist_from)
        found = list(greedy_sequence(embeddings, individual, relation))
    assert found == plain_greedy(embeddings, individual, len(individual), relation)


@pytest.mark.parametrize("values", ["normal", "negative", "nearly constant", "rounded", "constant"])
@pytest.mark.parametrize("kind", ["random", "tight", "duplicates"])
def test_equals_the_plain_loop_at_size(values: str, kind: str) -> None:
    embeddings, individual = make_case(1, 1500, 48, kind, values, "float32")
    relation = Relation(alpha=0.9, tau=0.7)
    expected = [index for index, _ in plain_greedy(embeddings, individual, 750, relation)]
    assert greedy_select(embeddings, individual, 750, 0.9, 0.7).tolist() == expected


def test_shortlist_saves_work(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, individual = make_case(2, 1500, 48, "random", "normal", "float32")
    scored = []
    exact = greedy._Greedy._exact
    monkeypatch.setattr(
        greedy._Greedy, "_exact", lambda self, rows, s, mean: (scored.append(rows.size // 48), exact(self, rows, s, mean))[1]
    )
    sweeps = []
    floor = greedy._Greedy._floor
    monkeypatch.setattr(greedy._Greedy, "_floor", lambda self, mean, drift: (sweeps.append(1), floor(self, mean, drift))[1])
    greedy_select(embeddings, individual, 750, 1.0, 1.0)
    assert sum(scored) + len(sweeps) * 1500 < 0.15 * 1500 * 750


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
    for rows in members_of_clusters(golden["cluster"]):
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


def plain_global(
    embeddings: np.ndarray, individual: np.ndarray, clusters: np.ndarray, lengths: np.ndarray, budget: int, relation: Relation
) -> list[int]:
    taken: list[int] = []
    while True:
        offers = []
        for cluster in np.unique(clusters):
            rows = np.flatnonzero(clusters == cluster)
            count = len(set(rows) & set(taken))
            sequence = plain_greedy(embeddings[rows], individual[rows], len(rows), relation)
            offers += [(score, cluster, int(rows[index])) for index, score in sequence[count : count + 1]]
        if not offers or lengths[[*taken, min(offers)[2]]].sum() > budget:
            return taken
        taken.append(min(offers)[2])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 400), relation=relations, rounded=st.booleans())
def test_global_competition_equals_the_plain_loop(seed: int, budget: int, relation: Relation, rounded: bool) -> None:
    embeddings, individual = make_case(seed, 24, 5, "duplicates", "rounded" if rounded else "normal", "float32")
    rng = np.random.default_rng(seed)
    clusters, lengths = rng.choice([0, 2, 3, 7], 24).astype(np.int32), rng.integers(1, 30, 24)
    found = greedy_global(embeddings, individual, clusters, lengths, budget, relation)
    assert found.dtype == np.int64
    assert found.tolist() == plain_global(embeddings, individual, clusters, lengths, budget, relation)


def test_members_of_clusters() -> None:
    members = members_of_clusters(np.array([3, 0, 3, 1, 0]))
    assert [rows.tolist() for rows in members] == [[1, 4], [3], [0, 2]]
    assert members_of_clusters(np.array([], np.int32)) == []
    assert greedy_select_related(np.eye(2), np.zeros(2), 2, Relation(kind="none")).tolist() == [0, 1]
