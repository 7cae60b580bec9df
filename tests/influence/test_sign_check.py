"""The sign check: how often it refuses right and reversed models, on data of known sign."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_groupmates.influence import fit_loop
from megatron_groupmates.influence.fit import fit_relational
from megatron_groupmates.influence.fit_data import FitData, fit_data
from megatron_groupmates.influence.fit_settings import FitSettings
from megatron_groupmates.influence.metrics import pearson
from megatron_groupmates.influence.sign_check import ENOUGH_HELD_OUT, sign_check

STEPS = 10


def draw(rng: np.random.Generator, held_out: int, standardisation: str = "per_position", dense: bool = False) -> tuple[np.ndarray, FitData]:
    """s of all samples, correlated to .5 with their true influence, and data whose labels are to .7 (dense: .85)."""
    num_rollouts = 5 * held_out
    truth = rng.standard_normal(num_rollouts * STEPS)

    def noisy(correlation: float) -> np.ndarray:
        return correlation * truth + (1 - correlation**2) ** 0.5 * rng.standard_normal(len(truth))

    rollouts = np.arange(len(truth)).reshape(num_rollouts, STEPS)
    # A trend over positions that every rollout has.
    labels = noisy(0.7)[rollouts] + 3.0 * np.arange(STEPS)
    split = np.arange(held_out, num_rollouts), np.arange(held_out)
    return noisy(0.5), fit_data(rollouts, labels, standardisation, split, noisy(0.85) if dense else None)


def refusals(held_out: int, sign: float, dense: bool = False, draws: int = 1000) -> tuple[float, float]:
    """Shares of models refused: by the first position alone, and by the check."""
    rng = np.random.default_rng(held_out)
    refused = np.zeros(2)
    for _ in range(draws):
        s, data = draw(rng, held_out, dense=dense)
        s = sign * s
        individual = s[data.held_out.numpy()]
        check = sign_check(individual, data, None if data.dense is None else s[data.dense.held_out])
        refused += pearson(individual[:, 0], data.held_out_targets[:, 0]) < 0, check["correlation"] < 0
    return tuple(refused / draws)


@pytest.mark.parametrize(
    ("held_out", "dense", "before", "after"), [(2, False, 0.384, 0.072), (5, False, 0.25, 0.005), (2, True, 0.384, 0.026)]
)
def test_few_held_out_rollouts_refuse_right_models_seldom_and_reversed_ones_nearly_always(held_out, dense, before, after):
    right, reversed_ = refusals(held_out, 1.0, dense), refusals(held_out, -1.0, dense)
    np.testing.assert_allclose(right, (before, after), atol=0.05)
    np.testing.assert_allclose(reversed_, (1 - before, 1 - after), atol=0.05)


@pytest.mark.parametrize("standardisation", ["pooled", "per_position"])
def test_kinds_of_evidence(standardisation):
    rng = np.random.default_rng(0)
    for held_out, dense, kind, samples in (
        (ENOUGH_HELD_OUT, True, "first_position", ENOUGH_HELD_OUT),
        (ENOUGH_HELD_OUT - 1, True, "dense", 190),
        (ENOUGH_HELD_OUT - 1, False, "all_positions", 190),
    ):
        s, data = draw(rng, held_out, standardisation, dense)
        check = sign_check(s[data.held_out.numpy()], data, None if data.dense is None else s[data.dense.held_out])
        assert (check["kind"], check["samples"]) == (kind, samples)
        # The trend over positions, of which a pooled standardisation leaves much, is no evidence.
        assert kind == "first_position" or 0.2 < check["correlation"] < 0.6


@pytest.mark.parametrize("individual", [None, np.random.default_rng(1).standard_normal(72)])
def test_reversed_fit_to_few_rollouts_is_refused(monkeypatch, individual):
    """A fit of whose model only the individual term is reversed, as a negative scale of the relation can make it."""
    rng = np.random.default_rng(1)
    dense = rng.standard_normal(72)
    features = np.stack([dense, rng.standard_normal(72)], axis=1).astype(np.float32)
    rollouts = np.arange(72).reshape(12, 6)
    settings = FitSettings(embedding_dim=4, epochs=20, learning_rate=3e-2, warmup_steps=1, batch_rollouts=4, max_refits=1)
    accepted = fit_relational(features, rollouts, dense[rollouts], settings, 0, individual=individual)
    assert accepted.model is not None and len(accepted.report["attempts"]) == 1
    train = fit_loop.Fit.train

    def train_reversed(self, progress):
        found = train(self, progress)
        return dataclasses.replace(
            found, individual=-found.individual, dense_individual=None if found.dense_individual is None else -found.dense_individual
        )

    monkeypatch.setattr(fit_loop.Fit, "train", train_reversed)
    refused = fit_relational(features, rollouts, dense[rollouts], settings, 0, individual=individual)
    assert refused.model is None and not refused.report["accepted"]
    kinds = [attempt["sign_check"]["kind"] for attempt in refused.report["attempts"]]
    assert kinds == 2 * ["all_positions" if individual is None else "dense"]
    assert refused.report["sign_check"]["correlation"] < 0
