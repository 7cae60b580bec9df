"""Directional labels: the derivative that autograd gives, the order of the exact increments, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import UserError
from megatron_groupmates.influence.directional import directional_labels
from megatron_groupmates.influence.metrics import spearman
from megatron_groupmates.influence.oracle import measure_rollouts
from megatron_groupmates.influence.reference import load_reference
from megatron_groupmates.model.batch import training_batch
from megatron_groupmates.model.losses import token_losses
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.context import sample_reader
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import ROWS_PER_SHARD, SEQUENCE_LENGTH, TrainedRun, one_rank, open_groups, trained_run

RATE = 1e-3
ALL = np.arange(sum(ROWS_PER_SHARD))
PREDICTABLE = ALL % 3 == 1
CPU = torch.device("cpu")


def build_probe(run: TrainedRun, groups: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt

    config = run.config(**changes)
    reference = load_reference(PoolIndex.open(run.root / "reference"), SEQUENCE_LENGTH, 4, CPU)
    rules = DocumentRules.of(config, eot_id=0)
    probe = Probe(build_gpt(config, groups, groups.tensor_size, dtype), config, groups, reference, 4, rules)
    probe.load(ZeroCheckpoint(run.tag(3)))
    return probe


def reader(run: TrainedRun) -> Any:
    return sample_reader(PoolIndex.open(run.root / "pool"), CPU, SEQUENCE_LENGTH)


def of_many_lengths(read_samples: Any) -> Any:
    """The same samples, number n cut to 2 to 17 tokens."""
    return lambda numbers: [sample[: 2 + 7 * n % 16] for n, sample in zip(numbers.tolist(), read_samples(numbers), strict=True)]


def train_further(probe: Any, read_samples: Any, steps: int) -> None:
    """Make the probe's checkpoint one of ``steps`` more steps on samples of the pool."""
    generator = np.random.default_rng(0)
    for _ in range(steps):
        probe.step(read_samples(generator.choice(ALL, 4, replace=False)), 3e-3)
    probe._saved = [(flat.master.detach().clone(), flat.average.clone(), flat.square.clone()) for flat in probe._flat]
    probe._saved_step += steps


def sample_gradient(probe: Any, sample: torch.Tensor) -> torch.Tensor:
    """Gradient float64 of the training loss of one sample, over the whole model."""
    from megatron_groupmates.model.gpt import token_logits

    batch = training_batch(sample[None], probe._rules)
    logits = token_logits(probe.model, batch.tokens, batch.attention_mask, batch.position_ids)
    losses = token_losses(logits, batch.labels, probe._groups.tensor_group)
    probe._backward(losses.training_loss(probe._config.model.z_loss))
    return torch.cat([flat.gradient for flat in probe._flat]).double()


def inner_products(probe: Any, samples: Any, learning_rate: float) -> np.ndarray:
    """The labels as defined, by one backward pass for each sample."""
    direction = torch.cat(probe.precondition(probe.checkpoint_gradient())).double()
    return np.array([-learning_rate * float(sample_gradient(probe, sample) @ direction) for sample in samples])


def labels_on_two_ranks(rank: int, world_size: int, run: TrainedRun) -> np.ndarray:
    probe = build_probe(run, open_groups(world_size))
    return directional_labels(probe, ALL[:24], of_many_lengths(reader(run)), RATE, 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained_run(1, tmp_path_factory)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with one_rank(tmp_path_factory.mktemp("group")) as opened:
        yield opened


@pytest.fixture(scope="module")
def trained(run: TrainedRun, groups: Any) -> Any:
    probe = build_probe(run, groups)
    train_further(probe, reader(run), 100)
    return probe


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_labels_are_inner_products_of_gradients_at_the_checkpoint(run, groups):
    probe, read_samples = build_probe(run, groups), reader(run)
    expected = inner_products(probe, read_samples(ALL), RATE)
    assert relative_error(directional_labels(probe, ALL, read_samples, RATE, 32), expected) < 1e-3
    assert relative_error(directional_labels(probe, ALL, read_samples, 5 * RATE, 32), 5 * expected) < 1e-3


def test_labels_are_inner_products_further_into_training(run, trained):
    # Where the predictable samples are nearly learned, gradients are small and curvature large: 3.4e-3 there, mostly theirs.
    read_samples = reader(run)
    expected = inner_products(trained, read_samples(ALL), RATE)
    assert relative_error(directional_labels(trained, ALL, read_samples, RATE, 32), expected) < 1e-2


@pytest.mark.parametrize("changes", [{}, {"data__reset_attention_mask": True, "data__eod_mask_loss": True}, {"model__z_loss": 0.0}])
def test_samples_of_any_lengths_and_the_runs_rules(run, groups, changes):
    probe, read_samples = build_probe(run, groups, **changes), of_many_lengths(reader(run))
    samples = read_samples(ALL)
    assert {len(sample) for sample in samples} == set(range(2, SEQUENCE_LENGTH + 2))
    found = directional_labels(probe, ALL, read_samples, RATE, 7)
    assert relative_error(found, inner_products(probe, samples, RATE)) < 2e-3


def test_what_a_label_leaves_out(run, groups):
    """The exact increment of a step on one sample, of weights that neither decay nor carry momentum, and no clipping."""
    unchanged = {"optimizer__weight_decay": 0.0, "training__gradient_clipping": 0.0}
    probe, read_samples = build_probe(run, groups, **unchanged), reader(run)
    train_further(probe, read_samples, 100)
    for _, average, square in probe._saved:
        average.zero_()
        # So large a second moment that the sample's own share of it vanishes.
        square.add_(1.0)
    rate = 3e-3
    exact = np.diff(measure_rollouts(probe, ALL[:24, None], read_samples, rate, "exact"))[:, 0]
    # Adam decays the second moment before it adds the gradient.
    beta2 = probe._config.optimizer.beta2
    found = directional_labels(probe, ALL[:24], read_samples, rate, 8) / beta2**0.5
    assert relative_error(found, exact) < 3e-2


@pytest.mark.parametrize("rate", [3e-4, 1e-3])
def test_labels_rank_samples_as_exact_increments_do(run, trained, rate):
    read_samples = reader(run)
    found = directional_labels(trained, ALL, read_samples, rate, 32)
    exact = np.diff(measure_rollouts(trained, ALL[:, None], read_samples, rate, "exact"))[:, 0]
    # Measured .96 over all, 1.00 and .99 within the kinds, whose difference alone would give .8.
    assert spearman(found, exact) > 0.9
    assert spearman(found[PREDICTABLE], exact[PREDICTABLE]) > 0.9
    assert spearman(found[~PREDICTABLE], exact[~PREDICTABLE]) > 0.9


def test_bfloat16_keeps_the_order(run, groups, trained):
    read_samples = reader(run)
    expected = inner_products(trained, read_samples(ALL), RATE)
    probe = build_probe(run, groups, torch.bfloat16)
    probe._saved, probe._saved_step, probe._checkpoint_gradient = trained._saved, trained._saved_step, None
    found = directional_labels(probe, ALL, read_samples, RATE, 32)
    # Measured .97 and .98.
    assert spearman(found[PREDICTABLE], expected[PREDICTABLE]) > 0.9
    assert spearman(found[~PREDICTABLE], expected[~PREDICTABLE]) > 0.9


def test_batches_change_labels_by_rounding_only(run, groups):
    probe, read_samples = build_probe(run, groups), of_many_lengths(reader(run))
    one_by_one, *others = (directional_labels(probe, ALL[:40], read_samples, RATE, size) for size in (1, 3, 64))
    assert max(relative_error(labels, one_by_one) for labels in others) < 2e-3
    order = np.random.default_rng(0).permutation(40)
    assert relative_error(directional_labels(probe, ALL[order], read_samples, RATE, 3), one_by_one[order]) < 2e-3
    ticks: list[int] = []
    labels = directional_labels(probe, ALL[:40], read_samples, RATE, 1, ticks.append)
    assert labels.dtype == np.float64 and labels.shape == (40,) and sum(ticks) == 40 and len(ticks) > 1


def test_no_samples(run, groups):
    assert directional_labels(build_probe(run, groups), ALL[:0], reader(run), RATE, 4).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_is_left_at_the_checkpoint(run, groups, dtype):
    probe, read_samples = build_probe(run, groups, dtype), reader(run)
    before = [p.detach().clone() for p in probe.model.parameters()]
    step = measure_rollouts(probe, ALL[None, :2], read_samples, RATE, "exact")
    directional_labels(probe, ALL[:9], read_samples, RATE, 4)
    assert all(torch.equal(p, old) for p, old in zip(probe.model.parameters(), before, strict=True))
    assert all(torch.equal(flat.master, saved[0]) for flat, saved in zip(probe._flat, probe._saved, strict=True))
    assert np.array_equal(measure_rollouts(probe, ALL[None, :2], read_samples, RATE, "exact"), step)


def test_two_tensor_parallel_ranks_give_the_labels_of_one(run, groups, tmp_path: Path):
    one = directional_labels(build_probe(run, groups), ALL[:24], of_many_lengths(reader(run)), RATE, 5)
    both = run_ranks(labels_on_two_ranks, 2, run, tmp_path=tmp_path)
    assert np.array_equal(both[0], both[1])
    assert relative_error(both[0], one) < 2e-3


def test_a_weight_without_second_moment_does_not_drown_the_others(run, trained, monkeypatch):
    read_samples = reader(run)
    others = ALL[~PREDICTABLE]
    before = directional_labels(trained, others, read_samples, RATE, 32)
    (name,) = [n for n in trained._flat[0].names if "word_embeddings" in n]
    position = trained._flat[0].names.index(name)
    begin = sum(p.numel() for p in trained._flat[0].parameters[:position])
    changed = [tuple(part.clone() for part in saved) for saved in trained._saved]
    # The embedding of token 3, which the reference uses and the others do not.
    width = trained._flat[0].parameters[position].shape[1]
    changed[0][2][begin + 3 * width : begin + 4 * width] = 0.0
    monkeypatch.setattr(trained, "_saved", changed)
    assert spearman(directional_labels(trained, others, read_samples, RATE, 32), before) > 0.99
    trained.restore()


def test_a_checkpoint_without_second_moment_is_refused(run, groups):
    probe = build_probe(run, groups)
    probe._saved_step = 0
    with pytest.raises(UserError, match=r"before the first optimizer step and has no second moment, which oracle\.estimator: directional"):
        directional_labels(probe, ALL[:2], reader(run), RATE, 2)
