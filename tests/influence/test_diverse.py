"""The diverse rollouts against a slow version of their definition, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence import diverse
from megatron_groupmates.influence.diverse import diverse_bootstrap
from megatron_groupmates.influence.relation import Relation


def plain_diverse(
    embeddings: np.ndarray,
    individual: np.ndarray,
    relation: Relation,
    num_steps: int,
    starts: list[int],
    sign: float,
    max_uses: int,
    window: int,
) -> list[list[int]]:
    """The definition for given starts, over Python lists, every inner product anew; fewer rollouts where no more are possible."""
    rows, numbers = embeddings.astype(np.float64), range(len(individual))
    mean = embeddings.mean(axis=0, dtype=np.float64)
    ranking = sorted(numbers, key=lambda x: (sign * relation.scores(individual[x], np.vecdot(rows[x], mean)), x))
    uses, rollouts = np.bincount(starts, minlength=len(individual)), []
    for start in starts:
        rollout = [start]
        choices = [x for x in ranking if uses[x] < max_uses][:window]
        for step in range(1, num_steps):
            scored = []
            for x in choices:
                similarity = sum(np.vecdot(rows[x], rows[member]) for member in rollout)
                scored.append((sign * relation.scores(individual[x], similarity / step), x))
            seen = [] if step < num_steps - 1 else [set(other) for other in rollouts]
            best = [x for _, x in sorted(scored) if x not in rollout and {*rollout, x} not in seen]
            if not best:
                return rollouts
            rollout.append(best[0])
        for x in rollout[1:]:
            uses[x] += 1
        rollouts.append(rollout)
    return rollouts


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    relation=st.sampled_from(
        [
            Relation(),
            Relation(tau=0.3),
            Relation(alpha=-0.7, tau=2.0),
            Relation(kind="additive", gamma=0.5, offset=0.1),
            Relation(kind="none"),
        ]
    ),
    num_steps=st.integers(1, 4),
    count=st.integers(0, 12),
    max_uses=st.integers(1, 6),
    num_candidates=st.integers(4, 60),
    window=st.sampled_from([1, 8, 256]),
    direction=st.sampled_from(["lowest", "highest"]),
    kind=st.sampled_from(["normal", "copies", "all alike"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_equals_the_slow_version(
    seed: int,
    relation: Relation,
    num_steps: int,
    count: int,
    max_uses: int,
    num_candidates: int,
    window: int,
    direction: str,
    kind: str,
    dtype: str,
) -> None:
    assume(num_candidates >= max(count, -(-count * num_steps // max_uses) + num_steps))
    rng = np.random.default_rng(seed)
    embeddings, individual = unit(rng.standard_normal((num_candidates, 4))), rng.standard_normal(num_candidates)
    kinds = {"normal": np.arange(num_candidates), "copies": rng.integers(0, 3, num_candidates), "all alike": np.zeros(num_candidates, int)}
    embeddings, individual = embeddings[kinds[kind]].astype(dtype), individual[kinds[kind]]
    sign = 1.0 if direction == "lowest" else -1.0
    order = np.argsort(sign * individual, kind="stable")
    starts = diverse._stratified_starts(order, count, np.random.default_rng(seed)).tolist()
    size = max(window, num_steps + max_uses)
    expected = plain_diverse(embeddings, individual, relation, num_steps, starts, sign, max_uses, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diverse, "_WINDOW", window)
        if len(expected) < count:
            with pytest.raises(UserError, match=f"only {len(expected)} of {count} diverse rollouts are possible"):
                diverse_bootstrap(embeddings, individual, relation, num_steps, count, direction, max_uses, seed)
        else:
            found = diverse_bootstrap(embeddings, individual, relation, num_steps, count, direction, max_uses, seed)
            assert found.tolist() == expected and found.shape == (count, num_steps)


@pytest.mark.parametrize("direction", ["lowest", "highest"])
@pytest.mark.parametrize("relation", [Relation(tau=2.0), Relation(alpha=-1.0)])
def test_promises(relation: Relation, direction: str) -> None:
    rng = np.random.default_rng(2)
    embeddings, individual = unit(rng.standard_normal((4000, 6))), rng.standard_normal(4000)
    rollouts = diverse_bootstrap(embeddings, individual, relation, 5, 400, direction, max_uses=4, seed=3)
    assert rollouts.shape == (400, 5) and rollouts.dtype == np.int64
    assert all(len(set(row)) == 5 for row in rollouts.tolist())
    assert len({frozenset(row) for row in rollouts.tolist()}) == 400
    assert np.bincount(rollouts.ravel()).max() <= 4
    order = np.argsort(individual if direction == "lowest" else -individual)
    ranks = np.sort(np.argsort(order)[rollouts[:, 0]])
    np.testing.assert_array_equal(ranks // 5, np.arange(400))
    # Under a negative alpha the samples that join a rollout are good where their own influence is bad.
    better = individual[rollouts[:, 1:]].mean() < 0
    assert better == ((direction == "lowest") == (relation.alpha > 0))


def test_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(2)
    embeddings, individual = unit(rng.standard_normal((400, 6))), rng.standard_normal(400)
    first, again, other = (diverse_bootstrap(embeddings, individual, Relation(), 5, 40, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rollouts_of_equal_candidates_still_differ() -> None:
    rollouts = diverse_bootstrap(np.ones((30, 3)), np.zeros(30), Relation(), 3, 20, max_uses=20)
    assert len({frozenset(row) for row in rollouts.tolist()}) == 20


def test_bad_input_is_named() -> None:
    embeddings, individual = np.eye(4), np.zeros(4)
    with pytest.raises(UserError, match="4 candidates cannot fill a rollout of 5"):
        diverse_bootstrap(embeddings, individual, Relation(), 5, 2)
    with pytest.raises(UserError, match="direction is 'best'; choose one of lowest, highest"):
        diverse_bootstrap(embeddings, individual, Relation(), 2, 2, direction="best")
    with pytest.raises(UserError, match="max_uses is 0; a sample must be allowed in at least 1 rollout"):
        diverse_bootstrap(embeddings, individual, Relation(), 2, 2, max_uses=0)
    with pytest.raises(UserError, match="10 diverse rollouts of 2 samples, each in at most 2, need 12 candidates but there are 4"):
        diverse_bootstrap(embeddings, individual, Relation(), 2, 10, max_uses=2)
    # The best of three candidates comes last with this seed: both pairs with it are taken by then.
    with pytest.raises(UserError, match="only 2 of 3 diverse rollouts are possible with 3 candidates"):
        diverse_bootstrap(np.eye(3), np.array([-3.0, -1.0, -2.0]), Relation(), 2, 3, max_uses=100, seed=3)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
