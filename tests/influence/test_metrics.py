"""Correlations against scipy, errors against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from megatron_groupmates.influence.metrics import average_ranks, fit_metrics, pearson, spearman


@pytest.mark.parametrize("levels", [3, 1000])
def test_correlations_equal_scipy(levels: int) -> None:
    rng = np.random.default_rng(levels)
    one = rng.integers(0, levels, 200).astype(float)
    other = one + rng.integers(0, levels, 200)
    np.testing.assert_array_equal(average_ranks(one), scipy.stats.rankdata(one))
    assert spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-12)
    assert pearson(one, other) == pytest.approx(scipy.stats.pearsonr(one, other).statistic, abs=1e-12)


def test_metrics_of_a_perfect_a_reversed_and_a_constant_prediction() -> None:
    targets = np.array([[1.0, 2.0], [4.0, 8.0]])
    assert fit_metrics(targets, targets) == pytest.approx({"spearman": 1, "pearson": 1, "mse": 0, "mae": 0})
    assert spearman(-(targets**3), targets) == pytest.approx(-1)
    constant = fit_metrics(np.full((2, 2), 0.1), targets)
    assert constant["spearman"] == constant["pearson"] == 0
    assert constant["mae"] == pytest.approx(3.65)
    assert constant["mse"] == pytest.approx(np.mean((targets - 0.1) ** 2))
