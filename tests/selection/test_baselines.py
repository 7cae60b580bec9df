"""Orders without relations, and overlap."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.selection.baselines import individual_order, overlap, random_order, similarities, similarity_order


def test_random_order_is_a_seeded_permutation() -> None:
    order = random_order(50, 1)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    np.testing.assert_array_equal(order, random_order(50, 1))
    assert not np.array_equal(order, random_order(50, 2))


def test_individual_order_takes_the_lowest_first_and_the_lower_row_of_a_tie() -> None:
    assert individual_order(np.array([0.5, -1.0, 0.5, -2.0, -1.0])).tolist() == [3, 1, 4, 0, 2]


def test_gumbel_order_draws_first_rows_in_proportion() -> None:
    individual, temperature = np.array([-1.0, 0.0, 0.5]), 0.8
    weights = np.exp(-individual / temperature)
    first = [individual_order(individual, temperature, seed)[0] for seed in range(3000)]
    np.testing.assert_allclose(np.bincount(first, minlength=3) / 3000, weights / weights.sum(), atol=0.03)
    np.testing.assert_array_equal(individual_order(individual, 0.8, 7), individual_order(individual, 0.8, 7))
    with pytest.raises(UserError, match=r"temperature is -1\.0"):
        individual_order(individual, -1.0)


def test_similarity_order_is_by_mean_cosine() -> None:
    rng = np.random.default_rng(0)
    embeddings, reference = rng.standard_normal((30, 5)), rng.standard_normal((4, 5)) * 7
    cosines = [np.mean([row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in reference]) for row in embeddings]
    np.testing.assert_allclose(similarities(embeddings, reference), cosines, rtol=1e-12)
    assert similarity_order(similarities(embeddings, reference)).tolist() == sorted(range(30), key=lambda row: -cosines[row])
    embeddings[[3, 20]] = embeddings[11]
    order = similarity_order(similarities(embeddings, reference)).tolist()
    assert order.index(11) == order.index(3) + 1 == order.index(20) - 1
    assert similarities(np.empty((0, 5)), reference).tolist() == []
    with pytest.raises(UserError, match=r"shape \[30, 5\] and reference embeddings \[4, 6\]"):
        similarities(embeddings, np.ones((4, 6)))


def test_overlap() -> None:
    found = overlap({"group": np.array([1, 2, 3, 4]), "random": np.array([9, 4]), "none": np.array([], np.int64)})
    assert found["jaccard"]["group"] == {"group": 1.0, "random": 0.2, "none": 0.0}
    assert found["share"]["group"]["random"] == 0.25
    assert found["share"]["random"]["group"] == 0.5
    assert found["jaccard"]["none"]["none"] == 1.0
