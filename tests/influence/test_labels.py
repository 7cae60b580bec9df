"""Increments, momentum correction and standardisation."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.labels import Standardiser, increments, influence_labels, momentum_corrected


def test_increments_are_differences_of_successive_losses() -> None:
    losses = np.array([[3.0, 2.5, 2.75], [3.0, 3.0, 1.0]])
    np.testing.assert_array_equal(increments(losses), [[-0.5, 0.25], [0.0, -2.0]])


def test_increments_refuse_broken_rollouts() -> None:
    losses = np.ones((4, 3))
    losses[2, 1] = np.nan
    with pytest.raises(UserError, match=r"1 of 4 rollouts .*first: rollout 2\); lower the oracle's learning rate"):
        increments(losses)
    with pytest.raises(UserError, match=r"shape \[5\]"):
        increments(np.ones(5))


def test_momentum_correction_inverts_adams_average_and_per_position_statistics_remove_the_checkpoints_share() -> None:
    rng = np.random.default_rng(0)
    own = rng.standard_normal((50, 8))
    beta1, carried = 0.9, 3.0
    influences = np.zeros_like(own)
    previous = np.full(50, carried)
    for t in range(8):
        influences[:, t] = previous = beta1 * previous + (1 - beta1) * own[:, t]
    corrected = momentum_corrected(influences, beta1)
    np.testing.assert_allclose(corrected[:, 1:], own[:, 1:], atol=1e-12)
    np.testing.assert_allclose(corrected[:, 0] - own[:, 0], beta1 * carried / (1 - beta1), atol=1e-12)
    np.testing.assert_allclose(
        Standardiser.fit(corrected, "per_position").apply(corrected), Standardiser.fit(own, "per_position").apply(own), atol=1e-10
    )


def test_influence_labels_by_kind() -> None:
    losses = np.random.default_rng(1).random((5, 4))
    np.testing.assert_array_equal(influence_labels(losses, "increments", 0.9), increments(losses))
    np.testing.assert_array_equal(influence_labels(losses, "momentum_corrected", 0.9), momentum_corrected(increments(losses), 0.9))
    with pytest.raises(UserError, match="labels is 'raw'; choose one of increments, momentum_corrected"):
        influence_labels(losses, "raw", 0.9)
    with pytest.raises(UserError, match=r"beta1 is 1\.0"):
        momentum_corrected(losses, 1.0)


@pytest.mark.parametrize("kind", ["pooled", "per_position"])
def test_standardiser(kind: str) -> None:
    labels = np.random.default_rng(2).standard_normal((100, 5)) * [1, 2, 3, 4, 5] + np.arange(5)
    fitted = Standardiser.fit(labels, kind)
    standardised = fitted.apply(labels)
    axis = None if kind == "pooled" else 0
    np.testing.assert_allclose(standardised.mean(axis=axis), 0, atol=1e-12)
    np.testing.assert_allclose(standardised.std(axis=axis), 1, atol=1e-12)
    np.testing.assert_allclose(fitted.invert(standardised), labels, atol=1e-12)
    assert Standardiser.from_json(fitted.to_json()) == fitted
    if kind == "pooled":
        assert len(set(fitted.mean)) == len(set(fitted.std)) == 1


def test_standardiser_leaves_equal_labels_at_zero_and_names_an_unknown_kind() -> None:
    labels = np.full((7, 3), 0.1)
    np.testing.assert_allclose(Standardiser.fit(labels, "per_position").apply(labels), 0, atol=1e-12)
    with pytest.raises(UserError, match="standardisation is 'z'; choose one of pooled, per_position"):
        Standardiser.fit(labels, "z")
