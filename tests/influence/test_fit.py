"""Fitting: recovers planted influences, deterministic, the same on several ranks, refuses flipped models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence import fit_loop
from megatron_groupmates.influence.fit import WarmStart, fit_relational, held_out_spearman
from megatron_groupmates.influence.fit_data import split_rollouts
from megatron_groupmates.influence.fit_loop import learning_rate_factor
from megatron_groupmates.influence.fit_settings import FitSettings
from tests.common.distributed import run_ranks

SETTINGS = FitSettings(embedding_dim=8, relation="additive", learning_rate=1e-2, epochs=8)


def planted(num_rollouts: int, gamma: float = 3.0, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of 16 dimensions, rollouts and labels that follow the additive relation, with a trend over positions."""
    rng = np.random.default_rng(7)
    latent = rng.standard_normal((num_rollouts, 6, 4))
    features = (latent @ rng.standard_normal((4, 16))).astype(np.float32)
    h = latent / np.linalg.norm(latent, axis=-1, keepdims=True)
    labels = h @ np.array([1.0, -1.0, 0.5, 0.0])
    for t in range(1, 6):
        labels[:, t] += gamma * np.einsum("rd,rd->r", h[:, t], h[:, :t].mean(axis=1)) + t
    numbers = np.arange(features[..., 0].size).reshape(num_rollouts, 6)
    return features.reshape(-1, 16), numbers, labels + noise * rng.standard_normal(labels.shape)


def parameters_after_fit(rank: int, world_size: int, num_rollouts: int) -> tuple[list[np.ndarray], float]:
    """One rank's fitted weights; ``num_rollouts`` makes some batches smaller than the group."""
    features, rollouts, labels = planted(num_rollouts)
    group = torch.distributed.new_group(list(range(world_size)))
    result = fit_relational(features, rollouts, labels, dataclasses.replace(SETTINGS, epochs=3, batch_rollouts=5), 0, group)
    assert result.model is not None
    return [value.numpy() for value in result.model.state_dict().values()], result.report["relational"]["spearman"]


def test_recovers_planted_influences_and_beats_its_baselines() -> None:
    features, rollouts, labels = planted(300)
    ticks: list[int] = []
    result = fit_relational(features, rollouts, labels, dataclasses.replace(SETTINGS, epochs=30), 0, progress=ticks.append)
    report = result.report
    assert result.model is not None and report["accepted"]
    assert report["relational"]["spearman"] > 0.8
    assert report["relational"]["spearman"] > report["individual"]["spearman"] + 0.1
    assert report["relational"]["mse"] < report["individual"]["mse"] < report["constant"]["mse"]
    assert report["constant"]["spearman"] == 0
    assert report["relation"]["gamma"] > 0
    assert (report["train_rollouts"], report["held_out_rollouts"]) == (240, 60)
    assert sum(ticks) == 60
    assert json.loads(json.dumps(report)) == report


def test_model_is_the_one_of_its_best_epoch_and_predicts_labels() -> None:
    features, rollouts, labels = planted(120)
    result = fit_relational(features, rollouts, labels, SETTINGS, 3)
    (attempt,) = result.report["attempts"]
    assert attempt["best_epoch"] == int(np.argmax(attempt["held_out_spearman"])) + 1
    assert result.report["relational"]["spearman"] == max(attempt["held_out_spearman"])
    train, held_out = split_rollouts(120, SETTINGS, 3)
    with torch.no_grad():
        predicted = result.model(torch.from_numpy(features[rollouts[held_out]])).numpy()
    error = predicted - result.model.standardiser.apply(labels)[held_out]
    assert np.mean(error**2) == pytest.approx(result.report["relational"]["mse"], rel=1e-5)
    # Statistics come from the training rollouts alone.
    np.testing.assert_allclose(result.model.standardiser.mean, labels[train].mean(axis=0), rtol=1e-12)


def test_deterministic_for_a_seed_whatever_the_global_random_state() -> None:
    features, rollouts, labels = planted(60)
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        np.random.seed(state)
        results.append(fit_relational(features, rollouts, labels, SETTINGS, 11))
    assert results[0].report == results[1].report
    for one, other in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert fit_relational(features, rollouts, labels, SETTINGS, 12).report["relational"] != results[0].report["relational"]


@pytest.mark.parametrize("num_rollouts", [40, 42])
def test_ranks_fit_what_one_rank_fits(tmp_path: Path, num_rollouts: int) -> None:
    features, rollouts, labels = planted(num_rollouts)
    alone = fit_relational(features, rollouts, labels, dataclasses.replace(SETTINGS, epochs=3, batch_rollouts=5), 0)
    weights = [value.numpy() for value in alone.model.state_dict().values()]
    (first, value), (second, _) = run_ranks(parameters_after_fit, 2, num_rollouts, tmp_path=tmp_path)
    for one, other, single in zip(first, second, weights, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, single, rtol=1e-3, atol=1e-4)
    assert value == pytest.approx(alone.report["relational"]["spearman"], abs=1e-3)


def test_model_that_is_flipped_at_the_first_position_is_refused() -> None:
    """Labels at t = 1 that contradict the five other positions cannot be fitted by any seed and on any split."""
    features, rollouts, labels = planted(100, gamma=0.0, noise=0.0)
    labels[:, 0] *= -1
    result = fit_relational(features, rollouts, labels, dataclasses.replace(SETTINGS, max_refits=2), 0)
    assert result.model is None
    assert not result.report["accepted"]
    assert [attempt["seed"] for attempt in result.report["attempts"]] == [0, 1, 2]
    for attempt in result.report["attempts"]:
        check = attempt["sign_check"]
        assert check["correlation"] < 0 and (check["kind"], check["samples"]) == ("first_position", 20)


def test_refit_has_another_split_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attempt's bad luck with its held-out rollouts is not that of the next."""
    features, rollouts, labels = planted(100, noise=0.0)
    _, held_out = split_rollouts(100, SETTINGS, 5)
    labels[held_out, 0] *= -1
    result = fit_relational(features, rollouts, labels, SETTINGS, 5)
    assert result.model is not None
    first, second = result.report["attempts"]
    assert (first["seed"], second["seed"], result.report["seed"]) == (5, 6, 5)
    assert first["sign_check"]["correlation"] < 0 < second["sign_check"]["correlation"]
    assert result.report["sign_check"] == second["sign_check"]
    # The baselines are judged on the rollouts of the attempt that counts.
    _, held_out = split_rollouts(100, SETTINGS, 6)
    train = np.setdiff1d(np.arange(100), held_out)
    error = (labels[held_out] - labels[train].mean(axis=0)) / labels[train].std(axis=0)
    assert result.report["constant"]["mse"] == pytest.approx(np.mean(error**2), rel=1e-5)


def test_features_can_be_the_embeddings() -> None:
    features, rollouts, labels = planted(40)
    result = fit_relational(features, rollouts, labels, dataclasses.replace(SETTINGS, embedding_dim=None, relation="product"), 0)
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


def test_warm_up_takes_at_most_a_tenth_of_all_steps() -> None:
    """40 rollouts make 2 steps in each of 15 epochs, so that 3 of the 30 warm up, whatever is asked for."""
    data = planted(40)
    fits = [fit_relational(*data, dataclasses.replace(SETTINGS, epochs=15, warmup_steps=steps), 0).report for steps in (2, 3, 1000)]
    assert fits[1]["attempts"] == fits[2]["attempts"] != fits[0]["attempts"]


def test_bad_input_is_named() -> None:
    features = np.ones((10, 4), np.float32)
    with pytest.raises(UserError, match="3 rollouts cannot be split"):
        fit_relational(features, np.zeros((3, 2), np.int64), np.ones((3, 2)), SETTINGS, 0)
    with pytest.raises(UserError, match=r"rollouts have shape \[5, 2\] \(int64\) and labels \[5, 3\]"):
        fit_relational(features, np.zeros((5, 2), np.int64), np.ones((5, 3)), SETTINGS, 0)
    with pytest.raises(UserError, match=r"rollouts have shape \[5, 2\] \(float64\)"):
        fit_relational(features, np.zeros((5, 2)), np.ones((5, 2)), SETTINGS, 0)
    with pytest.raises(UserError, match=r"features have shape \[5, 2, 4\]; give \[samples, feature_dim\]"):
        fit_relational(np.ones((5, 2, 4), np.float32), np.zeros((5, 2), np.int64), np.ones((5, 2)), SETTINGS, 0)


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
    """Features and noisy dense labels of samples, and 200 rollouts of them with noisier labels, at another scale."""
    rng = np.random.default_rng(3)
    features = rng.standard_normal((num_samples, 48)).astype(np.float32)
    influence = features @ rng.standard_normal(48) / 48**0.5
    rollouts = np.stack([rng.choice(num_samples, 4, replace=False) for _ in range(200)])
    labels = 5.0 * influence[rollouts] + 4.0 * rng.standard_normal(rollouts.shape) + np.arange(4)
    return features, influence + 0.3 * rng.standard_normal(num_samples), rollouts, labels


def test_dense_labels_improve_the_fit_when_rollouts_are_few() -> None:
    features, dense, rollouts, labels = planted_dense(2000)
    settings = dataclasses.replace(SETTINGS, relation="product", epochs=20, embedding_dim=16)
    held_out = np.arange(15, 200)
    alone = held_out_spearman(features, rollouts, labels, settings, 0, held_out)
    # Labels of all samples: those of the training rollouts scale them, those of the held-out rollouts are left out.
    together = held_out_spearman(features, rollouts, labels, settings, 0, held_out, individual=dense)
    assert together > alone + 0.1


def test_dense_labels_are_scaled_by_least_squares_and_leave_held_out_samples_out() -> None:
    features, dense, rollouts, labels = planted_dense()
    result = fit_relational(features, rollouts, labels, dataclasses.replace(SETTINGS, epochs=2), 0, individual=dense)
    train, held_out = split_rollouts(200, SETTINGS, 0)
    report = result.report["individual_labels"]
    assert report["left_out"] == len(np.unique(rollouts[held_out])) and report["labels"] == 600 - report["left_out"]
    x = dense[rollouts[train]] - dense[rollouts[train]].mean()
    y = labels[train] - labels[train].mean(axis=0)
    assert report["slope"] == pytest.approx(np.linalg.lstsq(x.reshape(-1, 1), y.ravel(), rcond=None)[0][0])
    assert fit_relational(features, rollouts, labels, SETTINGS, 0).report["individual_labels"] is None


@pytest.mark.parametrize(
    ("individual", "message"),
    [
        (np.ones(119), r"individual labels have shape \[119\], but rollouts hold sample 119; give one label per sample"),
        (np.ones((120, 1)), r"individual labels have shape \[120, 1\]"),
        (np.r_[np.ones(119), np.nan], "1 of 120 individual labels are not finite"),
    ],
)
def test_bad_dense_labels_are_named(individual: np.ndarray, message: str) -> None:
    features, rollouts, labels = planted(20)
    with pytest.raises(UserError, match=message):
        fit_relational(features, rollouts, labels, SETTINGS, 0, individual=individual)


def test_stops_when_the_held_out_spearman_no_longer_rises() -> None:
    """Of labels that are noise the best epoch comes early; the epochs before the stop are those of a fit without one."""
    features, rollouts, labels = planted(60)
    labels = np.random.default_rng(0).standard_normal(labels.shape)
    settings = dataclasses.replace(SETTINGS, epochs=40)
    ticks: list[int] = []
    result = fit_relational(features, rollouts, labels, settings, 0, progress=ticks.append)
    attempts = result.report["attempts"]
    assert result.report["patience"] == settings.patience == 14
    assert any(attempt["stopped"] == "patience" for attempt in attempts)
    for attempt in attempts:
        if attempt["stopped"] == "patience":
            assert len(attempt["held_out_spearman"]) == attempt["best_epoch"] + 14 < 40
        else:
            assert len(attempt["held_out_spearman"]) == 40
    assert sum(ticks) == 40 * (len(attempts) + 1)
    assert [dataclasses.replace(SETTINGS, epochs=epochs).patience for epochs in (1, 5, 15, 16, 30)] == [5, 5, 5, 6, 10]


def test_a_fit_that_diverges_is_not_a_model(monkeypatch) -> None:
    """Whatever the epochs before were worth, weights that are not finite are not kept; without an epoch before, there is no model."""
    data = planted(60)
    epoch = fit_loop.Fit._epoch

    def diverging(after: int):
        def run(self, *arguments) -> None:
            self.epochs = getattr(self, "epochs", 0) + 1
            epoch(self, *arguments)
            if self.epochs > after:
                with torch.no_grad():
                    self.model.head_weight.fill_(float("nan"))

        return run

    monkeypatch.setattr(fit_loop.Fit, "_epoch", diverging(2))
    result = fit_relational(*data, SETTINGS, 0)
    assert result.model is not None and all(value.isfinite().all() for value in result.model.parameters())
    assert result.report["attempts"][-1]["best_epoch"] in (1, 2)
    monkeypatch.setattr(fit_loop.Fit, "_epoch", diverging(0))
    result = fit_relational(*data, SETTINGS, 0)
    assert result.model is None and not result.report["accepted"] and len(result.report["attempts"]) == SETTINGS.max_refits + 1


class TestWarmStart:
    def start(self, **changes: object) -> tuple[WarmStart, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """A model of 240 rollouts, and 40 further ones, whose features have another scale."""
        features, rollouts, labels = planted(280)
        settings = dataclasses.replace(SETTINGS, epochs=30, **changes)
        model = fit_relational(features, rollouts[:240], labels[:240], settings, 0).model
        assert model is not None
        return WarmStart(model=model, number=2), (10 * features - 3, rollouts[240:], labels[240:])

    def test_begins_at_the_earlier_model_and_reports_what_it_was_worth(self) -> None:
        start, (features, rollouts, labels) = self.start()
        before = {name: value.clone() for name, value in start.model.state_dict().items()}
        settings = dataclasses.replace(SETTINGS, epochs=3)
        ticks: list[int] = []
        warm = fit_relational(features, rollouts, labels, settings, 0, progress=ticks.append, warm_start=start)
        scratch = fit_relational(features, rollouts, labels, settings, 0)
        found = warm.report["warm_start"]
        assert found["from"] == 2 and found["spearman_before"] > 0.6
        assert found["spearman"] == warm.report["relational"]["spearman"] >= found["spearman_before"]
        assert found["spearman_from_scratch"] == scratch.report["relational"]["spearman"] < found["spearman"]
        # Relations are judged from the same start: the individual baseline has it too.
        assert warm.report["individual"]["spearman"] > scratch.report["individual"]["spearman"]
        assert sum(ticks) == 9
        assert [attempt["start"] for attempt in warm.report["attempts"]] == ["warm"]
        assert scratch.report["warm_start"] is None and scratch.report["attempts"][0]["start"] == "scratch"
        # Statistics are this round's own; the model that was given stays.
        train, _ = split_rollouts(40, settings, 0)
        np.testing.assert_allclose(warm.model.standardiser.mean, labels[train].mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(warm.model.feature_mean, features[rollouts[train]].mean(axis=(0, 1)), rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())

    def test_a_start_that_no_epoch_betters_is_kept(self) -> None:
        start, (features, rollouts, labels) = self.start()
        settings = dataclasses.replace(SETTINGS, epochs=9, learning_rate=3.0, warmup_steps=0)
        result = fit_relational(features, rollouts, labels, settings, 0, warm_start=start)
        (attempt,) = result.report["attempts"]
        assert attempt["best_epoch"] == 0 and attempt["stopped"] == "patience" and len(attempt["held_out_spearman"]) == 5
        assert result.report["warm_start"]["spearman"] == result.report["warm_start"]["spearman_before"]
        assert torch.equal(result.model.projection, start.model.projection)

    @pytest.mark.parametrize("change", [{"embedding_dim": 4}, {"relation": "product"}, {"embedding_dim": None}])
    def test_from_scratch_where_shapes_or_relation_differ(self, caplog: pytest.LogCaptureFixture, change: dict[str, object]) -> None:
        start, (features, rollouts, labels) = self.start()
        settings = dataclasses.replace(SETTINGS, epochs=2, **change)
        result = fit_relational(features, rollouts, labels, settings, 0, warm_start=start)
        assert result.report["warm_start"] is None
        assert result.report == fit_relational(features, rollouts, labels, settings, 0).report
        assert "round 2's model" in caplog.text and "the fit begins from scratch" in caplog.text

    def test_a_refused_start_is_not_tried_again(self) -> None:
        start, (features, rollouts, labels) = self.start(relation="additive")
        labels = labels.copy()
        labels[:, 0] *= -1
        many = np.tile(rollouts, (3, 1)), np.tile(labels, (3, 1))
        result = fit_relational(features, *many, dataclasses.replace(SETTINGS, epochs=2, max_refits=1), 0, warm_start=start)
        first, second = result.report["attempts"]
        assert (first["start"], second["start"]) == ("warm", "scratch") and first["sign_check"]["correlation"] < 0
        assert result.report["warm_start"]["from"] == 2
