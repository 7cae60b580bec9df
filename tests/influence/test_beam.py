"""The beam search against a plain one that scores every candidate after every rollout."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence import extensions
from megatron_groupmates.influence.beam import beam_search
from megatron_groupmates.influence.extensions import Extensions
from megatron_groupmates.influence.relation import Relation

KINDS = ("normal", "tight", "long", "duplicates", "copies of one", "collapsed", "grid")
VALUES = ("normal", "rounded", "constant", "zero", "nearly constant", "heavy tails", "tiny")
RELATIONS = st.one_of(
    st.builds(Relation, alpha=st.sampled_from([1.0, 0.6, -0.8]), tau=st.sampled_from([0.3, 1.0, 2.0, 1e17])),
    st.builds(Relation, kind=st.just("additive"), gamma=st.sampled_from([0.7, -0.4, 0.0]), offset=st.sampled_from([0.0, 0.1])),
    st.builds(Relation, kind=st.just("none")),
)


def plain_beam_search(
    embeddings: np.ndarray, individual: np.ndarray, relation: Relation, num_steps: int, num_beams: int, num_extensions: int, sign: float
) -> list[tuple[int, ...]]:
    """Method as published, over Python tuples: (sum, rollout), every candidate scored at every step."""
    numbers = range(len(individual))
    rows = embeddings.astype(np.float64)
    products = [np.vecdot(rows, row).tolist() for row in rows]
    beams = sorted((sign * float(individual[x]), (x,)) for x in numbers)[:num_beams]
    for _ in range(num_steps - 1):
        extended = []
        for total, rollout in beams:
            scored = []
            for x in numbers:
                if x not in rollout:
                    similarity, *others = sorted(products[x][member] for member in rollout)
                    for product in others:
                        similarity += product
                    scored.append((sign * relation.scores(float(individual[x]), similarity / len(rollout)), x))
            extended += [(total + score, (*rollout, x)) for score, x in sorted(scored)[:num_extensions]]
        beams = sorted(extended)[:num_beams]
    return [rollout for _, rollout in beams]


def make_case(seed: int, size: int, dim: int, kind: str, values: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((size, dim))
    if kind in ("tight", "collapsed"):
        embeddings = embeddings * (0.1 if kind == "tight" else 1e-7) + rng.standard_normal(dim)
    if kind != "long":
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    if kind == "grid":
        embeddings = np.round(embeddings)
    individual = {
        "normal": rng.standard_normal(size),
        "rounded": np.round(rng.standard_normal(size)),
        "constant": np.full(size, -0.3),
        "zero": np.zeros(size),
        "nearly constant": -1 + 1e-4 * rng.standard_normal(size),
        "heavy tails": rng.standard_cauchy(size),
        "tiny": 1e-30 * rng.standard_normal(size),
    }[values]
    if kind == "duplicates":
        copies = rng.integers(0, -(-size // 4), size)
        embeddings, individual = embeddings[copies], individual[copies]
    if kind == "copies of one":
        embeddings[:] = embeddings[0]
    return embeddings.astype(dtype), individual


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 10**6),
    relation=RELATIONS,
    num_steps=st.integers(1, 5),
    num_beams=st.integers(1, 6),
    num_extensions=st.integers(1, 4),
    num_candidates=st.integers(5, 40),
    direction=st.sampled_from(["lowest", "highest"]),
    kind=st.sampled_from(KINDS),
    values=st.sampled_from(VALUES),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    fast_bfloat16=st.booleans(),
)
def test_equals_the_plain_search(
    seed: int,
    relation: Relation,
    num_steps: int,
    num_beams: int,
    num_extensions: int,
    num_candidates: int,
    direction: str,
    kind: str,
    values: str,
    dtype: str,
    fast_bfloat16: bool,
) -> None:
    embeddings, individual = make_case(seed, num_candidates, 5, kind, values, dtype)
    sign = 1.0 if direction == "lowest" else -1.0
    expected = plain_beam_search(embeddings, individual, relation, num_steps, num_beams, num_extensions, sign)
    # Small blocks: the shortlist, later blocks and their bounds all have a part in it.
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"_GROUPS": 3, "_FIRST_COLUMNS": 4, "_COLUMNS": 5, "_PAIRS": 7, "_ROWS": 6}.items():
            patch.setattr(extensions, name, size)
        patch.setattr(extensions, "has_fast_bfloat16", lambda: fast_bfloat16)
        found = beam_search(embeddings, individual, relation, num_steps, num_beams, num_extensions, direction)
    assert found.dtype == np.int64
    assert [tuple(rollout) for rollout in found.tolist()] == expected


@pytest.mark.parametrize(
    "relation",
    [Relation(tau=0.3), Relation(tau=1.0), Relation(alpha=-1.0, tau=2.0), Relation(kind="additive", gamma=0.5), Relation(kind="none")],
)
@pytest.mark.parametrize("kind", ["normal", "tight", "duplicates", "collapsed"])
def test_equals_the_plain_search_of_many(monkeypatch: pytest.MonkeyPatch, relation: Relation, kind: str) -> None:
    embeddings, individual = make_case(1, 250, 16, kind, "normal", "float32")
    for direction, sign, fast_bfloat16 in (("lowest", 1.0, True), ("highest", -1.0, False)):
        monkeypatch.setattr(extensions, "has_fast_bfloat16", lambda fast=fast_bfloat16: fast)
        expected = plain_beam_search(embeddings, individual, relation, 4, 10, 5, sign)
        found = beam_search(embeddings, individual, relation, 4, 10, 5, direction)
        assert [tuple(rollout) for rollout in found.tolist()] == expected


@pytest.mark.parametrize("fast_bfloat16", [False, True])
@pytest.mark.parametrize("relation", [Relation(tau=0.3), Relation(alpha=-1.0), Relation(kind="additive", gamma=0.5), Relation(kind="none")])
@pytest.mark.parametrize("kind", ["normal", "tight", "long", "collapsed", "grid"])
def test_bounds_hold(monkeypatch: pytest.MonkeyPatch, kind: str, relation: Relation, fast_bfloat16: bool) -> None:
    """A candidate is kept wherever the limit is just its score, and seldom where the limit is the score of another."""
    monkeypatch.setattr(extensions, "has_fast_bfloat16", lambda: fast_bfloat16)
    embeddings, individual = make_case(6, 120, 48, kind, "nearly constant", "float32")
    search = Extensions(embeddings, individual, relation, -1.0, 4, 5)
    groups, columns = np.arange(60).reshape(20, 3), np.arange(60, 120)
    exact = np.array([search._exact(groups, np.full(20, column)) for column in columns]).T
    assert (search._tile(groups)[1][columns] <= exact).all()
    for place, column in enumerate(columns):
        found = search._tile(groups)[0].within(columns, exact[:, place].copy(), len(individual))
        kept = np.zeros(exact.shape, bool)
        kept[found] = True
        assert kept[:, place].all(), column
        assert kept[exact <= exact[:, [place]]].all()
        assert kind == "grid" or relation.kind == "none" or not kept[exact > exact[:, [place]] + 0.02 * np.ptp(exact)].any()


@pytest.mark.parametrize("values", ["normal", "constant"])
def test_block_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch, values: str) -> None:
    embeddings, individual = make_case(2, 1200, 24, "normal", values, "float32")
    whole = beam_search(embeddings, individual, Relation(tau=0.5), 5, 80)
    for name, size in {"_GROUPS": 37, "_FIRST_COLUMNS": 10, "_COLUMNS": 200, "_PAIRS": 100, "_ROWS": 50}.items():
        monkeypatch.setattr(extensions, name, size)
    np.testing.assert_array_equal(beam_search(embeddings, individual, Relation(tau=0.5), 5, 80), whole)


@pytest.mark.parametrize("scale", [1e-60, 1e-25, 1e25, 1e60])
def test_any_scale(scale: float) -> None:
    embeddings, individual = make_case(3, 400, 8, "long", "normal", "float64")
    for scores in (1.0, scale):
        found = beam_search(scale * embeddings, scores * individual, Relation(tau=scale**2), 4, 20)
        np.testing.assert_array_equal(found, beam_search(embeddings, individual, Relation(), 4, 20))


@pytest.mark.parametrize("kind", ["copies of one", "duplicates"])
@pytest.mark.parametrize("values", ["zero", "constant"])
def test_ties_stay_small(kind: str, values: str) -> None:
    """Every extension of every rollout ties: a search that kept all would hold 6,000 x 500 of them."""
    embeddings, individual = make_case(4, 6000, 8, kind, values, "float32")
    if kind == "duplicates":
        embeddings, individual = embeddings[np.arange(6000) % 3], individual[np.arange(6000) % 3]
    tracemalloc.start()
    found = beam_search(embeddings, individual, Relation(), 5, 500)
    assert tracemalloc.get_traced_memory()[1] < 16e6
    tracemalloc.stop()
    assert found.shape == (500, 5)
    if values == "zero":
        assert found[:7].tolist() == [[0, 1, 2, 3, x] for x in range(4, 9)] + [[0, 1, 2, 4, x] for x in (3, 5)]


def test_returns_what_there_is_when_few_rollouts_exist() -> None:
    found = beam_search(np.eye(3), np.array([3.0, 1.0, 2.0]), Relation(), 3, 100)
    assert sorted(map(tuple, found.tolist())) == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert beam_search(np.eye(3), np.zeros(3), Relation(), 3, 0).shape == (0, 3)


def test_bad_input_is_named() -> None:
    embeddings, individual = np.eye(4), np.zeros(4)
    with pytest.raises(UserError, match="4 candidates cannot fill a rollout of 5"):
        beam_search(embeddings, individual, Relation(), 5, 2)
    with pytest.raises(UserError, match="direction is 'best'; choose one of lowest, highest"):
        beam_search(embeddings, individual, Relation(), 2, 2, direction="best")
    with pytest.raises(UserError, match=r"embeddings have shape \[4, 4\] and individual \[3\]; give \[N, d\] with \[N\]"):
        beam_search(embeddings, individual[:3], Relation(), 2, 2)
    for value in (np.nan, np.inf, -1e91):
        with pytest.raises(UserError, match=r"influence is (nan|inf|1e\+91), not a number below 1e\+90; fit the relational model again"):
            beam_search(embeddings, np.full(4, value), Relation(), 2, 2)
        with pytest.raises(UserError, match="an embedding or an individual influence is"):
            beam_search(np.full((4, 4), value), individual, Relation(), 2, 2)
