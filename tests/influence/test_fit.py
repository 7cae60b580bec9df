"""Fitting: recovers planted influences, deterministic, the same on several ranks, refuses flipped models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence import fit
from megatron_groupmates.influence.fit import FitSettings, fit_relational, learning_rate_factor, split_rollouts
from tests.common.distributed import run_ranks

SETTINGS = FitSettings(embedding_dim=8, relation="additive", learning_rate=1e-2, epochs=8)


def planted(num_rollouts: int, gamma: float = 3.0, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Features of 16 dimensions whose labels follow the additive relation, with a trend over positions."""
    rng = np.random.default_rng(7)
    latent = rng.standard_normal((num_rollouts, 6, 4))
    features = (latent @ rng.standard_normal((4, 16))).astype(np.float32)
    h = latent / np.linalg.norm(latent, axis=-1, keepdims=True)
    labels = h @ np.array([1.0, -1.0, 0.5, 0.0])
    for t in range(1, 6):
        labels[:, t] += gamma * np.einsum("rd,rd->r", h[:, t], h[:, :t].mean(axis=1)) + t
    return features, labels + noise * rng.standard_normal(labels.shape)


def parameters_after_fit(rank: int, world_size: int, num_rollouts: int) -> tuple[list[np.ndarray], float]:
    """One rank's fitted weights; ``num_rollouts`` makes some batches smaller than the group."""
    features, labels = planted(num_rollouts)
    group = torch.distributed.new_group(list(range(world_size)))
    result = fit_relational(features, labels, dataclasses.replace(SETTINGS, epochs=3, batch_rollouts=5), 0, group)
    assert result.model is not None
    return [value.numpy() for value in result.model.state_dict().values()], result.report["relational"]["spearman"]


def test_recovers_planted_influences_and_beats_its_baselines() -> None:
    features, labels = planted(300)
    ticks: list[int] = []
    result = fit_relational(features, labels, dataclasses.replace(SETTINGS, epochs=30), 0, progress=ticks.append)
    report = result.report
    assert result.model is not None and report["accepted"]
    assert report["relational"]["spearman"] > 0.8
    assert report["relational"]["spearman"] > report["individual"]["spearman"] + 0.1
    assert report["relational"]["mse"] < report["individual"]["mse"] < report["constant"]["mse"]
    assert report["constant"]["spearman"] == 0
    assert report["relation"]["gamma"] > 0
    assert (report["train_rollouts"], report["held_out_rollouts"]) == (240, 60)
    assert len(ticks) == 60
    assert json.loads(json.dumps(report)) == report


def test_model_is_the_one_of_its_best_epoch_and_predicts_labels() -> None:
    features, labels = planted(120)
    result = fit_relational(features, labels, SETTINGS, 3)
    (attempt,) = result.report["attempts"]
    assert attempt["best_epoch"] == int(np.argmax(attempt["held_out_spearman"])) + 1
    assert result.report["relational"]["spearman"] == max(attempt["held_out_spearman"])
    train, held_out = split_rollouts(120, SETTINGS, 3)
    with torch.no_grad():
        predicted = result.model(torch.from_numpy(features[held_out])).numpy()
    error = predicted - result.model.standardiser.apply(labels)[held_out]
    assert np.mean(error**2) == pytest.approx(result.report["relational"]["mse"], rel=1e-5)
    # Statistics come from the training rollouts alone.
    np.testing.assert_allclose(result.model.standardiser.mean, labels[train].mean(axis=0), rtol=1e-12)


def test_deterministic_for_a_seed_whatever_the_global_random_state() -> None:
    features, labels = planted(60)
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        np.random.seed(state)
        results.append(fit_relational(features, labels, SETTINGS, 11))
    assert results[0].report == results[1].report
    for one, other in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert fit_relational(features, labels, SETTINGS, 12).report["relational"] != results[0].report["relational"]


@pytest.mark.parametrize("num_rollouts", [40, 42])
def test_ranks_fit_what_one_rank_fits(tmp_path: Path, num_rollouts: int) -> None:
    features, labels = planted(num_rollouts)
    alone = fit_relational(features, labels, dataclasses.replace(SETTINGS, epochs=3, batch_rollouts=5), 0)
    weights = [value.numpy() for value in alone.model.state_dict().values()]
    (first, value), (second, _) = run_ranks(parameters_after_fit, 2, num_rollouts, tmp_path=tmp_path)
    for one, other, single in zip(first, second, weights, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, single, rtol=1e-3, atol=1e-4)
    assert value == pytest.approx(alone.report["relational"]["spearman"], abs=1e-3)


def test_model_that_is_flipped_at_the_first_position_is_refused() -> None:
    """Labels at t = 1 that contradict the others on the held-out rollouts only cannot be fitted by any seed."""
    features, labels = planted(80, gamma=0.0, noise=0.0)
    _, held_out = split_rollouts(80, SETTINGS, 0)
    labels[held_out, 0] *= -1
    result = fit_relational(features, labels, dataclasses.replace(SETTINGS, max_refits=2), 0)
    assert result.model is None
    assert not result.report["accepted"]
    assert [attempt["seed"] for attempt in result.report["attempts"]] == [0, 1, 2]
    assert all(attempt["first_position_correlation"] < 0 for attempt in result.report["attempts"])


def test_refit_that_passes_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = planted(40)
    first_positions = iter([-0.5, 0.4])
    train = fit._train

    def flipped_once(relation: str, *args: object) -> object:
        model, outcome = train(relation, *args)
        if relation != "none":
            outcome["first_position_correlation"] = next(first_positions)
        return model, outcome

    monkeypatch.setattr(fit, "_train", flipped_once)
    result = fit_relational(features, labels, dataclasses.replace(SETTINGS, epochs=1), 5)
    assert result.model is not None
    assert [attempt["seed"] for attempt in result.report["attempts"]] == [5, 6]


def test_features_can_be_the_embeddings() -> None:
    features, labels = planted(40)
    result = fit_relational(features, labels, dataclasses.replace(SETTINGS, embedding_dim=None, relation="product"), 0)
    assert result.model is None or result.model.projection is None
    assert result.report["relation"]["kind"] == "product"


@pytest.mark.parametrize(("num_rollouts", "limit", "expected"), [(4, 1000, 2), (100, 1000, 20), (100, 7, 7)])
def test_split_sizes(num_rollouts: int, limit: int, expected: int) -> None:
    train, held_out = split_rollouts(num_rollouts, dataclasses.replace(SETTINGS, max_held_out=limit), 1)
    assert len(held_out) == expected
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(num_rollouts))


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    assert [learning_rate_factor(step, 4, 10) for step in (0, 3, 4, 7, 10)] == [0.25, 1.0, 1.0, 0.5, 0.0]
    assert learning_rate_factor(0, 0, 10) == 1.0


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="3 rollouts cannot be split"):
        fit_relational(np.ones((3, 2, 4), np.float32), np.ones((3, 2)), SETTINGS, 0)
    with pytest.raises(UserError, match=r"features have shape \[5, 2, 4\] and labels \[5, 3\]"):
        fit_relational(np.ones((5, 2, 4), np.float32), np.ones((5, 3)), SETTINGS, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"max_refits": -1}, "max_refits is -1; it must be at least 0"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction is 1\.0"),
        ({"relation": "none"}, "relation is 'none'; choose product or additive"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **change)


def planted_dense(num_samples: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and noisy dense labels of samples, and 200 rollouts of them with features and noisier labels, at another scale."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((num_samples, 48)).astype(np.float32)
    influence = features @ rng.standard_normal(48) / 48**0.5
    rollouts = np.stack([rng.choice(num_samples, 4, replace=False) for _ in range(200)])
    labels = 5.0 * influence[rollouts] + 4.0 * rng.standard_normal(rollouts.shape) + np.arange(4)
    return features, influence + 0.3 * rng.standard_normal(num_samples), features[rollouts], labels


def test_dense_labels_improve_the_fit_when_rollouts_are_few() -> None:
    features, dense, rollout_features, labels = planted_dense(2000)
    settings = dataclasses.replace(SETTINGS, relation="product", epochs=20, embedding_dim=16)
    held_out = np.arange(15, 200)
    alone = fit.held_out_spearman(rollout_features, labels, settings, 0, held_out)
    # Labels of all samples: those of the training rollouts scale them, those of the held-out rollouts are left out.
    together = fit.held_out_spearman(rollout_features, labels, settings, 0, held_out, individual=(features, dense))
    assert together > alone + 0.1


def test_dense_labels_are_scaled_by_least_squares_and_leave_held_out_samples_out() -> None:
    features, dense, rollout_features, labels = planted_dense()
    result = fit_relational(rollout_features, labels, dataclasses.replace(SETTINGS, epochs=2), 0, individual=(features, dense))
    train, held_out = split_rollouts(200, SETTINGS, 0)
    report = result.report["individual_labels"]
    names = {row.tobytes(): number for number, row in enumerate(features)}
    numbers = np.array([[names[row.tobytes()] for row in rollout] for rollout in rollout_features])
    assert report["left_out"] == len(np.unique(numbers[held_out])) and report["labels"] == 600 - report["left_out"]
    x = dense[numbers[train]] - dense[numbers[train]].mean()
    y = labels[train] - labels[train].mean(axis=0)
    assert report["slope"] == pytest.approx(np.linalg.lstsq(x.reshape(-1, 1), y.ravel(), rcond=None)[0][0])
    assert fit_relational(rollout_features, labels, SETTINGS, 0).report["individual_labels"] is None


@pytest.mark.parametrize(
    ("individual", "message"),
    [
        ((np.ones((5, 16), np.float32), np.ones(4)), r"individual features have shape \[5, 16\] and labels \[4\]; give \[samples, 16\]"),
        ((np.ones((2, 16), np.float32), np.array([1.0, np.nan])), "1 of 2 individual labels are not finite"),
        ((np.ones((2, 16), np.float32), np.ones(2)), "none of the training rollouts' samples has an individual label"),
    ],
)
def test_bad_dense_labels_are_named(individual: tuple[np.ndarray, np.ndarray], message: str) -> None:
    features, labels = planted(20)
    with pytest.raises(UserError, match=message):
        fit_relational(features, labels, SETTINGS, 0, individual=individual)
