"""Oracle influences: rollouts are drawn without repeats, and a rollout's losses depend on nothing but the rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.influence import flat
from megatron_groupmates.influence.oracle import draw_random_rollouts, measure_rollouts
from megatron_groupmates.influence.reference import load_reference
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.context import sample_reader
from tests.common.gpt_runs import SEQUENCE_LENGTH, one_rank, trained_run

RATE = 1e-2


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(8, 60), st.integers(0, 2**31))
def test_random_rollouts(count, length, num_candidates, seed):
    rollouts = draw_random_rollouts(count, length, num_candidates, seed)
    assert rollouts.shape == (count, length) and rollouts.dtype == np.int64
    assert rollouts.min() >= 0 and rollouts.max() < num_candidates
    assert all(len(set(rollout)) == length for rollout in rollouts.tolist())
    assert np.array_equal(rollouts, draw_random_rollouts(count, length, num_candidates, seed))


def test_random_rollouts_use_the_seed_and_every_candidate():
    one, other = (draw_random_rollouts(400, 5, 20, seed) for seed in (1, 2))
    assert not np.array_equal(one, other)
    # 100 uses of each candidate are expected, with a deviation below 10.
    counts = np.bincount(one.ravel(), minlength=20)
    assert counts.min() > 50 and counts.max() < 150


@pytest.fixture(scope="module")
def probe_and_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt

    run = trained_run(1, tmp_path_factory)
    with one_rank(tmp_path_factory.mktemp("group")) as groups:
        device = torch.device("cpu")
        reference = load_reference(PoolIndex.open(run.root / "reference"), SEQUENCE_LENGTH, 4, device)
        probe = Probe(build_gpt(run.config(), groups, 1, torch.float32), run.config(), groups, reference, 4, DocumentRules(eot_id=0))
        probe.load(ZeroCheckpoint(run.tag(3)))
        yield probe, sample_reader(PoolIndex.open(run.root / "pool"), device, SEQUENCE_LENGTH)


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_losses_do_not_depend_on_order_or_company(probe_and_reader, estimator):
    probe, read_samples = probe_and_reader
    rollouts = draw_random_rollouts(6, 3, 40, 0)
    ticks: list[int] = []
    losses = measure_rollouts(probe, rollouts, read_samples, RATE, estimator, ticks.append)
    assert losses.shape == (6, 4) and losses.dtype == np.float64 and ticks == [1] * 6
    assert np.array_equal(measure_rollouts(probe, rollouts[::-1], read_samples, RATE, estimator), losses[::-1])
    assert np.array_equal(measure_rollouts(probe, rollouts[2:4], read_samples, RATE, estimator), losses[2:4])
    assert len({tuple(row) for row in losses.tolist()}) == 6


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_the_probe_is_left_at_the_checkpoint(probe_and_reader, estimator):
    probe, read_samples = probe_and_reader
    probe.restore()
    before = [p.detach().clone() for p in probe.model.parameters()]
    measure_rollouts(probe, draw_random_rollouts(2, 3, 40, 0), read_samples, RATE, estimator)
    assert all(torch.equal(p, old) for p, old in zip(probe.model.parameters(), before, strict=True))


def test_exact_losses_are_those_of_the_steps_taken_one_by_one(probe_and_reader):
    probe, read_samples = probe_and_reader
    rows = np.array([1, 5, 7])
    forward, backward = measure_rollouts(probe, np.stack([rows, rows[::-1]]), read_samples, RATE, "exact")
    expected = [probe.reference_loss()]
    for sample in read_samples(rows):
        probe.step(sample[None], RATE)
        expected.append(probe.reference_loss())
    assert forward.tolist() == expected
    # The order within a rollout matters: the first loss is the checkpoint's, the second the first sample's.
    assert backward[0] == expected[0] and backward[1] != expected[1]


def test_first_order_losses_are_the_gradient_times_each_change_added_up(probe_and_reader):
    probe, read_samples = probe_and_reader
    rows = np.array([2, 4, 6, 8])
    found = measure_rollouts(probe, rows[None], read_samples, RATE, "first_order")[0]
    gradient = torch.cat(probe.reference_gradient()).double()

    def weights() -> torch.Tensor:
        return torch.cat([part.master.detach().double() for part in probe._flat])

    expected = [0.0]
    for sample in read_samples(rows):
        before = weights()
        probe.step(sample[None], RATE)
        expected.append(expected[-1] + float(gradient @ (weights() - before)))
    np.testing.assert_allclose(found, expected, rtol=1e-11)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 2**31))
def test_inner_products_in_parts(count, part, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second, origin = (torch.randn(count, generator=generator) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flat._PART_ELEMENTS, "cpu", part)
        products = flat.inner_product(first, second), flat.inner_product(first, second, origin)
    expected = first.double() @ second.double(), first.double() @ (second.double() - origin.double())
    assert all(product.dtype == torch.float64 for product in products)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-12)


def test_first_order_approaches_exact_at_a_tiny_learning_rate(probe_and_reader):
    probe, read_samples = probe_and_reader
    rollouts = np.array([[1, 2, 4], [5, 7, 8], [9, 10, 11]])
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        exact, linear = (measure_rollouts(probe, rollouts, read_samples, rate, estimator) for estimator in ("exact", "first_order"))
        exact -= exact[:, :1]
        assert (linear[:, 0] == 0.0).all()
        errors.append(float(np.linalg.norm(exact - linear) / np.linalg.norm(exact)))
    # The neglected term is quadratic in the step.
    assert errors[2] < 5e-2 and errors[2] < errors[1] < errors[0]


def test_a_predictable_sample_helps_a_predictable_reference_more(probe_and_reader):
    probe, read_samples = probe_and_reader
    rows = np.arange(60).reshape(20, 3)
    predictable, other = (np.diff(measure_rollouts(probe, rows[:, [column]], read_samples, RATE, "exact")) for column in (1, 0))
    assert predictable.max() < other.min()
