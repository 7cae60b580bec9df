"""Vocabulary-parallel losses equal torch's, values and gradients, whatever the tensor-parallel size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_groupmates.model.losses import IGNORED_LABEL, next_token_batch, token_losses
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import one_rank

B, S, V = 3, 7, 24
Z_LOSS = 0.3


def inputs(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 ``[B, S, V]`` and labels with some ignored; the first row's labels are all ignored."""
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(B, S, V, generator=generator)
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0] = IGNORED_LABEL
    labels[1, 2] = IGNORED_LABEL
    labels[2, 0], labels[2, 1], labels[2, 2] = 0, V // 2, V - 1
    return logits, labels


def reference(scale: float) -> dict[str, torch.Tensor]:
    """The same in float64 with torch's own functions."""
    logits, labels = inputs(scale)
    logits = logits.double().requires_grad_()
    scored = labels != IGNORED_LABEL
    cross_entropy = torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100, reduction="sum")
    squared = logits.logsumexp(-1)[scored].square().sum()
    loss = (cross_entropy + Z_LOSS * squared) / scored.sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (without_z,) = torch.autograd.grad(cross_entropy / scored.sum(), logits)
    return {
        "cross_entropy": cross_entropy.detach(),
        "squared": squared.detach(),
        "num_tokens": scored.sum(),
        "loss": loss.detach(),
        "gradient": gradient,
        "without_z": without_z,
    }


def measure(rank: int, world_size: int, scale: float) -> dict[str, torch.Tensor]:
    """One rank's losses and the gradient of its slice of the vocabulary."""
    logits, labels = inputs(scale)
    mine = logits.chunk(world_size, -1)[rank].clone().requires_grad_()
    losses = token_losses(mine, labels, torch.distributed.group.WORLD)
    loss = losses.training_loss(Z_LOSS)
    (gradient,) = torch.autograd.grad(loss, mine, retain_graph=True)
    (without_z,) = torch.autograd.grad(losses.training_loss(0.0), mine)
    return {
        "cross_entropy": losses.cross_entropy.detach(),
        "squared": losses.squared_log_partition.detach(),
        "num_tokens": losses.num_tokens,
        "loss": loss.detach(),
        "gradient": gradient,
        "without_z": without_z,
    }


def measure_scales(rank: int, world_size: int) -> dict[float, dict[str, torch.Tensor]]:
    return {scale: measure(rank, world_size, scale) for scale in (1.0, 300.0)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], list[Any]]]:
    """``measured(size)[rank][scale]``."""
    launched: dict[int, list[Any]] = {}
    with one_rank(tmp_path_factory.mktemp("group")):
        launched[1] = [measure_scales(0, 1)]
    launched[2] = run_ranks(measure_scales, 2, tmp_path=tmp_path_factory.mktemp("ranks"))
    yield launched.__getitem__


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_values_and_gradients_equal_torch(measured, size, scale):
    expected = reference(scale)
    for found in measured(size):
        for name in ("cross_entropy", "squared", "num_tokens", "loss"):
            torch.testing.assert_close(found[scale][name].double(), expected[name].double(), rtol=2e-6, atol=1e-6)
    for name in ("gradient", "without_z"):
        gathered = torch.cat([found[scale][name] for found in measured(size)], -1)
        torch.testing.assert_close(gathered.double(), expected[name], rtol=1e-5, atol=1e-4 if scale > 1 else 1e-7)
    assert bool((expected["gradient"] != expected["without_z"]).any())


@pytest.mark.parametrize("size", [1, 2])
def test_ignored_labels_have_no_gradient(measured, size):
    gathered = torch.cat([found[1.0]["gradient"] for found in measured(size)], -1)
    _, labels = inputs(1.0)
    assert bool((gathered[labels == IGNORED_LABEL] == 0).all()) and bool((gathered[labels != IGNORED_LABEL] != 0).any(-1).all())


def test_losses_are_bitwise_the_same_on_every_rank(measured):
    for name in ("cross_entropy", "squared", "loss"):
        assert torch.equal(measured(2)[0][1.0][name], measured(2)[1][1.0][name])


def test_gradient_equals_finite_differences(tmp_path):
    logits, labels = inputs(1.0)
    with one_rank(tmp_path):
        group = torch.distributed.group.WORLD
        variable = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(token_losses(variable, labels, group).training_loss(Z_LOSS), variable)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
        step = 1e-2
        ahead, behind = (token_losses(logits + sign * step * direction, labels, group).training_loss(Z_LOSS) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=2e-3)


def test_bfloat16_logits_are_scored_in_float32(tmp_path):
    logits, labels = inputs(1.0)
    with one_rank(tmp_path):
        group = torch.distributed.group.WORLD
        low = logits.bfloat16().requires_grad_()
        losses = token_losses(low, labels, group)
        losses.training_loss(Z_LOSS).backward()
        assert losses.cross_entropy.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
        assert torch.equal(losses.cross_entropy, token_losses(low.detach().float(), labels, group).cross_entropy)


def test_labels_are_the_next_tokens():
    samples = torch.arange(10).reshape(2, 5)
    tokens, labels = next_token_batch(samples)
    assert tokens.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]] and labels.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert tokens.is_contiguous() and labels.is_contiguous()
