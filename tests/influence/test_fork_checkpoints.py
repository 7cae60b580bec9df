"""On a Megatron-DeepSpeed checkout's own checkpoints: the losses it computes itself, and the step it takes next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_groupmates.checkpoint.megatron_deepspeed import megatron_core_name
from megatron_groupmates.checkpoint.opening import open_checkpoint
from megatron_groupmates.config import Config
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.batch import DocumentRules
from megatron_groupmates.model.losses import next_token_batch
from tests.common.distributed import run_ranks
from tests.common.forks import BFLOAT16, FLOAT32, NUM_EVALUATED, VARIANTS, batch_of_next_step, expected, fork_config, next_weights, tag_dir
from tests.common.gpt_runs import one_rank, open_groups
from tests.model.test_architectures import whole


def measure(rank: int, world_size: int) -> dict[str, Any]:
    """What a server of ``world_size`` ranks makes of each checkpoint; weights whole, after the step."""
    groups, found = open_groups(world_size), {}
    for variant in VARIANTS:
        config = fork_config(variant, training={"precision": "fp32"}, server={"tensor_model_parallel_size": world_size})
        probe, checkpoint = load_probe(config, variant, groups)
        losses, mean = own_losses(probe, variant), probe.reference_loss()
        norm = probe.step(batch_of_next_step(variant), checkpoint.next_learning_rate)
        gated = config.model.activation == "swiglu"
        weights = {name: whole(name, p, p.detach(), gated, groups) for name, p in probe.model.named_parameters()}
        found[variant] = {"losses": losses, "mean": mean, "norm": norm, "weights": weights}
    return found


def load_probe(config: Config, variant: str, groups: Any) -> tuple[Any, Any]:
    from megatron_groupmates.influence.probe import Probe
    from megatron_groupmates.model.gpt import build_gpt

    checkpoint = open_checkpoint(config, tag_dir(variant))
    model = build_gpt(config, groups, groups.tensor_size, torch.float32)
    probe = Probe(model, config, groups, ReferenceSet(*next_token_batch(evaluated(variant))), 3, DocumentRules(eot_id=0))
    probe.load(checkpoint)
    return probe, checkpoint


def evaluated(variant: str) -> torch.Tensor:
    return torch.from_numpy(expected(variant)["samples"][-NUM_EVALUATED:])


def own_losses(probe: Any, variant: str) -> torch.Tensor:
    batch, counts = probe.pack(evaluated(variant))
    return probe.sample_losses(batch, counts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with one_rank(tmp_path_factory.mktemp("group")) as groups:
        yield groups


@pytest.fixture(scope="module")
def one(world: Any) -> dict[str, Any]:
    return measure(0, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(measure, 2, tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_that_the_checkout_computes(one, two, variant):
    theirs = torch.from_numpy(expected(variant)["losses"]).double()
    # A bfloat16 run computes with rounded weights and activations; its losses here are of the float32 masters.
    tolerance = 5e-3 if variant == BFLOAT16 else 1e-5
    for found in (one[variant], *(rank[variant] for rank in two)):
        torch.testing.assert_close(found["losses"], theirs, rtol=0.0, atol=tolerance)
        assert found["mean"] == pytest.approx(theirs.mean().item(), abs=tolerance)


def test_rotary_angles_are_the_cosines_that_the_checkout_computes(world):
    """With the angles that rotary embeddings should have, the losses are others."""
    variant = "llama-tp2-zero2"
    probe, _ = load_probe(fork_config(variant, model={"rotary_angles": "positions"}), variant, world)
    assert (own_losses(probe, variant) - torch.from_numpy(expected(variant)["losses"])).abs().max() > 0.05


@pytest.mark.parametrize("variant", FLOAT32)
def test_a_step_is_the_one_that_the_checkout_takes_next(one, two, variant):
    """Same loss, clipping, weight decay (decoupled or not) and moments, at the learning rate that the checkpoint names."""
    config = fork_config(variant)
    checkpoint = open_checkpoint(config, tag_dir(variant))
    after = {megatron_core_name(name): value for name, value in next_weights(variant).items()}
    assert one[variant]["norm"] > config.training.gradient_clipping > 0.0, "the step must be clipped for the comparison to show it"
    for found in (one[variant], *(rank[variant] for rank in two)):
        assert found["norm"] == pytest.approx(one[variant]["norm"], rel=1e-5)
        assert found["weights"].keys() == after.keys()
        for name, weight in after.items():
            ours, theirs, before = (
                without_key_biases(name, value, config) for value in (found["weights"][name], weight, checkpoint.read(name, "param"))
            )
            moved = (theirs - before).norm()
            assert moved > 1e-3 and (ours - theirs).norm() < 1e-4 * moved, name


def without_key_biases(name: str, value: torch.Tensor, config: Config) -> torch.Tensor:
    """No loss depends on the keys' biases: their gradients are rounding alone, which Adam makes steps of."""
    if not name.endswith("linear_qkv.bias"):
        return value
    return value.view(config.model.num_attention_heads, 3, -1)[:, ::2]
