"""Fits that train the source of the features with the model: best epoch, ranks, restored weights, bounded batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megatron_groupmates.influence import fit_loop
from megatron_groupmates.influence.features import FrozenFeatures, as_source, encode_all
from megatron_groupmates.influence.fit import WarmStart, fit_relational, held_out_spearman
from megatron_groupmates.influence.fit_data import split_rollouts
from megatron_groupmates.influence.fit_settings import FitSettings
from tests.common.distributed import run_ranks

SETTINGS = FitSettings(embedding_dim=4, relation="additive", learning_rate=1e-2, epochs=6, batch_rollouts=5, weight_decay=0.01)


class TinySource:
    """One layer on a table of inputs, of which the influence is no linear function; counts what it is asked."""

    def __init__(self, inputs: np.ndarray) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.from_numpy(inputs)
        self.weight = nn.Parameter(0.5 * torch.randn(inputs.shape[1], 5, generator=generator))
        self.feature_dim = 5
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        self.asked.append((numbers.numel(), torch.is_grad_enabled()))
        return torch.tanh(self.inputs[numbers] @ self.weight)

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]


def planted(num_rollouts: int) -> tuple[TinySource, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((300, 6)).astype(np.float32)
    rollouts = rng.integers(0, 300, (num_rollouts, 4))
    influence = np.tanh(inputs @ np.array([2.0, -2.0, 1.0, 0, 0, 0])) - np.tanh(inputs @ np.array([0, 0, 2.0, 2.0, 0, 0]))
    return TinySource(inputs), rollouts, influence[rollouts] + 0.1 * rng.standard_normal(rollouts.shape)


def frozen(source: TinySource) -> np.ndarray:
    with torch.no_grad():
        return source(torch.arange(300)).numpy()


def weights_after_fit(rank: int, world_size: int, num_rollouts: int) -> tuple[list[np.ndarray], float]:
    source, rollouts, labels = planted(num_rollouts)
    dense = np.random.default_rng(0).standard_normal(300)
    group = torch.distributed.new_group(list(range(world_size))) if world_size > 1 else None
    result = fit_relational(source, rollouts, labels, dataclasses.replace(SETTINGS, epochs=3), 0, group, individual=dense)
    assert result.model is not None
    return [*(value.numpy() for value in result.model.state_dict().values()), source.weight.detach().numpy()], result.report["relational"][
        "spearman"
    ]


def test_training_the_source_betters_the_fit_and_keeps_both_at_the_best_epoch() -> None:
    source, rollouts, labels = planted(120)
    still = fit_relational(frozen(source), rollouts, labels, SETTINGS, 1).report["relational"]
    before = source.weight.detach().clone()
    result = fit_relational(source, rollouts, labels, dataclasses.replace(SETTINGS, epochs=12), 1)
    assert result.model is not None and not torch.equal(source.weight, before)
    assert result.report["relational"]["spearman"] > still["spearman"] + 0.02
    assert result.report["relational"]["spearman"] > result.report["individual"]["spearman"] - 0.1
    _, held_out = split_rollouts(120, SETTINGS, 1)
    with torch.no_grad():
        predicted = result.model(source(torch.from_numpy(rollouts[held_out]))).numpy()
    error = predicted - result.model.standardiser.apply(labels)[held_out]
    assert np.mean(error**2) == pytest.approx(result.report["relational"]["mse"], rel=1e-5)


@pytest.mark.parametrize("num_rollouts", [40, 41])
def test_ranks_fit_what_one_rank_fits(tmp_path: Path, num_rollouts: int) -> None:
    weights, spearman = weights_after_fit(0, 1, num_rollouts)
    (first, value), (second, _) = run_ranks(weights_after_fit, 2, num_rollouts, tmp_path=tmp_path)
    for one, other, alone in zip(first, second, weights, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, alone, rtol=1e-3, atol=1e-4)
    assert value == pytest.approx(spearman, abs=1e-3)


def test_source_is_as_before_where_no_model_comes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source, rollouts, labels = planted(40)
    before = source.weight.detach().clone()
    held_out_spearman(source, rollouts, labels, SETTINGS, 0, np.arange(8))
    assert torch.equal(source.weight, before)
    train = fit_loop.Fit.train

    def reverse(self, progress):
        found = train(self, progress)
        return dataclasses.replace(found, individual=-found.individual)

    starts = []
    make = fit_loop.Fit.__init__

    def note(self, source, *args):
        starts.append(source.weight.detach().clone())
        make(self, source, *args)

    monkeypatch.setattr(fit_loop.Fit, "train", reverse)
    monkeypatch.setattr(fit_loop.Fit, "__init__", note)
    result = fit_relational(source, rollouts, labels, dataclasses.replace(SETTINGS, epochs=15, max_refits=1), 0)
    assert result.model is None and torch.equal(source.weight, before)
    # Both attempts and the baseline begin where the first did.
    assert len(starts) == 3 and all(torch.equal(start, before) for start in starts)


def test_held_out_predictions_come_in_bounded_batches_without_gradient() -> None:
    source, _, _ = planted(8)
    numbers = torch.arange(300)
    encoded = encode_all(source, numbers)
    torch.testing.assert_close(encoded, torch.from_numpy(frozen(source)))
    assert [count for count, _ in source.asked[:-1]] == [256, 44]
    assert not any(gradient for _, gradient in source.asked) and not encoded.requires_grad


def test_warm_start_is_not_compared_with_a_second_training_of_the_encoder() -> None:
    source, rollouts, labels = planted(40)
    model = fit_relational(source, rollouts, labels, SETTINGS, 0).model
    assert model is not None
    report = fit_relational(source, rollouts, labels, SETTINGS, 1, warm_start=WarmStart(model=model, number=3)).report["warm_start"]
    assert report["from"] == 3 and report["spearman_from_scratch"] is None
    assert report["spearman"] >= report["spearman_before"] > 0.2


def test_a_table_is_a_source() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    source = as_source(table)
    assert source.parameters() == [] and source.feature_dim == 3
    np.testing.assert_array_equal(source(torch.tensor([[2, 0]])).numpy(), table[[[2, 0]]])
    assert as_source(source) is source and isinstance(as_source(torch.from_numpy(table)), FrozenFeatures)
