"""Bootstrap rollouts of both methods, and what their coverage says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.bootstrap import bootstrap_coverage, bootstrap_rollouts
from megatron_groupmates.influence.relation import Relation


def candidates(count: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, 6))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), rng.standard_normal(count)


@pytest.mark.parametrize("method", ["plain", "diverse"])
def test_half_lowest_half_highest(method: str) -> None:
    embeddings, individual = candidates(200)
    rollouts = bootstrap_rollouts(embeddings, individual, Relation(tau=3.0), 11, 4, method, seed=1)
    assert rollouts.shape == (11, 4) and rollouts.dtype == np.int64
    means = individual[rollouts].mean(axis=1)
    assert (means[:6] < 0).all() and (means[6:] > 0).all()


@pytest.mark.parametrize("method", ["plain", "diverse"])
@pytest.mark.parametrize("count", [0, 1])
def test_an_odd_rollout_is_among_the_lowest(method: str, count: int) -> None:
    embeddings, individual = candidates(50)
    rollouts = bootstrap_rollouts(embeddings, individual, Relation(tau=3.0), count, 4, method)
    assert rollouts.shape == (count, 4)
    assert (individual[rollouts].mean(axis=1) < 0).all()


def test_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match="bootstrap method is 'beam'; choose one of plain, diverse"):
        bootstrap_rollouts(np.eye(4), np.zeros(4), Relation(), 2, 2, "beam")


def test_coverage() -> None:
    coverage = bootstrap_coverage(np.array([[0, 1, 7], [7, 0, 1], [0, 9, 4]]))
    assert coverage == {"rollouts": 3, "distinct_samples": 5, "distinct_sets": 2, "max_uses": 3, "uses": [2, 2, 1]}
    assert json.loads(json.dumps(coverage)) == coverage


def test_coverage_of_no_rollouts() -> None:
    empty = {"rollouts": 0, "distinct_samples": 0, "distinct_sets": 0, "max_uses": 0, "uses": []}
    assert bootstrap_coverage(np.empty((0, 10), np.int64)) == empty


def test_diverse_rollouts_cover_more_than_a_beam() -> None:
    embeddings, individual = candidates(2000)
    coverage = {
        method: bootstrap_coverage(bootstrap_rollouts(embeddings, individual, Relation(tau=2.0), 200, 5, method))
        for method in ("plain", "diverse")
    }
    assert coverage["diverse"]["distinct_sets"] == 200 > coverage["plain"]["distinct_sets"]
    assert coverage["diverse"]["distinct_samples"] > 4 * coverage["plain"]["distinct_samples"]
    assert coverage["diverse"]["max_uses"] <= 2 * 5 < coverage["plain"]["max_uses"]
