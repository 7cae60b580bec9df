"""Held-out losses of reference sets: whatever the batches and ranks, the mean of examples taken one by one, unpadded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.pool.index import PoolIndex
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, make_pools, open_groups, tiny_config
from tests.pool.helpers import make_reference_set

NUM_EXAMPLES = 11
BATCH_SIZES = (1, 3, 8, 20)


def make_set(directory: Path) -> None:
    """Examples of 2 to 17 tokens, scored at random but for the first, at least one token each."""
    generator = np.random.default_rng(0)
    lengths = [2, SEQUENCE_LENGTH + 1, *generator.integers(2, SEQUENCE_LENGTH + 2, NUM_EXAMPLES - 2)]
    samples = [generator.integers(0, VOCABULARY, length) for length in lengths]
    masks = [np.append(False, generator.random(length - 1) < 0.5) for length in lengths]
    for mask in masks:
        mask[generator.integers(1, len(mask))] = True
    make_reference_set(directory, samples, masks)


def one_by_one(model: Any, index: PoolIndex, groups: Any, num_examples: int) -> float:
    """The definition: each example by itself, no padding, a mean over all scored tokens."""
    import torch

    from megatron_groupmates.model.gpt import token_logits
    from megatron_groupmates.model.losses import token_losses
    from megatron_groupmates.pool.reader import PoolReader
    from megatron_groupmates.pool.references.examples import ScoredTokens

    total, count = 0.0, 0
    for row in range(num_examples):
        sample, scored = torch.from_numpy(PoolReader(index).read(row)), ScoredTokens(index).read(row)
        labels = sample[1:].masked_fill(torch.from_numpy(~scored[1:]), -100)
        with torch.no_grad():
            losses = token_losses(token_logits(model, sample[None, :-1]), labels[None], groups.tensor_group)
        total, count = total + losses.cross_entropy.item(), count + int(scored.sum())
    return total / count


def measure(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """Losses under tensor-parallel size 2, then under data-parallel size 2."""
    import torch

    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.influence.reference import load_reference
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt
    from megatron_groupmates.training.evaluation import evaluation_loss
    from megatron_groupmates.training.heldout import HeldOutData

    index, rules, results = PoolIndex.open(root / "set"), DocumentRules(0), {}
    pool = PoolIndex.open(root / "pool")
    for tensor_size in (2, 1):
        config = tiny_config(root, parallel__tensor_model_parallel_size=tensor_size)
        groups = open_groups(tensor_size)
        model = build_gpt(config, groups, tensor_size, torch.float32)
        expected = {number: one_by_one(model, index, groups, number) for number in (5, NUM_EXAMPLES)}
        found, numbers = [], []
        shared_config = tiny_config(root, parallel__tensor_model_parallel_size=tensor_size, parallel__sequence_parallel=True)
        shared = build_gpt(shared_config, groups, tensor_size, torch.float32, for_training=True)
        for batch_size in BATCH_SIZES:
            for number in (5, NUM_EXAMPLES):
                data = HeldOutData(index, SEQUENCE_LENGTH, number, batch_size, groups)
                found.append((expected[number], evaluation_loss(model, data, groups, rules)))
                numbers.append(len(list(data)))
                padded = HeldOutData(index, SEQUENCE_LENGTH, number, batch_size, groups, length_multiple=tensor_size)
                assert all(tokens.shape[1] % tensor_size == 0 for tokens, _ in padded)
                found.append((expected[number], evaluation_loss(shared, padded, groups, rules)))
        gradients = []
        for batch_size in BATCH_SIZES:
            reference = load_reference(index, SEQUENCE_LENGTH, NUM_EXAMPLES, groups.device)
            probe = Probe(build_gpt(config, groups, tensor_size, torch.float32), config, groups, reference, batch_size, rules)
            found.append((expected[NUM_EXAMPLES], probe.reference_loss()))
            gradients.append(torch.cat(probe.reference_gradient()))
        whole = HeldOutData(pool, SEQUENCE_LENGTH, None, 16, groups)
        results[f"tensor {tensor_size}"] = {
            "losses": found,
            "batches": numbers,
            "gradients": max((gradient - gradients[0]).abs().max().item() for gradient in gradients),
            "pool of contexts": (one_by_one(model, pool, groups, pool.num_samples), evaluation_loss(model, whole, groups, rules)),
        }
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("heldout")
    make_pools(root)
    make_set(root / "set")
    return run_ranks(measure, 2, root, tmp_path=root)


@pytest.mark.parametrize("case", ["tensor 2", "tensor 1"])
def test_losses_do_not_depend_on_batches_padding_or_ranks(measured: list[dict[str, Any]], case: str) -> None:
    for rank in measured:
        losses = rank[case]["losses"]
        assert len({expected for expected, _ in losses}) == 2
        assert [found for _, found in losses] == pytest.approx([expected for expected, _ in losses], rel=1e-6)
        assert rank[case]["gradients"] < 1e-6
        expected, found = rank[case]["pool of contexts"]
        assert found == pytest.approx(expected, rel=1e-6)


def test_every_rank_has_as_many_batches(measured: list[dict[str, Any]]) -> None:
    """ZeRO-3 gathers parameters in each forward pass: a rank with one batch fewer would leave the others waiting."""
    first, second = (rank["tensor 1"]["batches"] for rank in measured)
    assert first == second == [3, 6, 1, 2, 1, 1, 1, 1]
    assert measured[0]["tensor 2"]["batches"] == [5, 11, 2, 4, 1, 2, 1, 1]
