"""Each option of the architecture: the same on one and two tensor-parallel ranks, packed or not, and as many weights as counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_groupmates.model.losses import next_token_batch, token_losses
from megatron_groupmates.model.sizes import model_size
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, one_rank, open_groups, tiny_config
from tests.model.test_gpt import gather

SAMPLES = torch.randint(VOCABULARY, (3, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(4))
GPT2 = {
    "model__activation": "gelu",
    "model__normalization": "LayerNorm",
    "model__qk_layernorm": False,
    "model__add_bias_linear": True,
    "model__position_embedding_type": "learned_absolute",
    "model__max_position_embeddings": 20,
    "model__untie_embeddings_and_output_weights": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "tanh": {"model__activation": "gelu_tanh", "model__ffn_hidden_size": None},
    "biased swiglu": {"model__add_bias_linear": True, "model__normalization": "LayerNorm"},
    "tied": {"model__untie_embeddings_and_output_weights": False},
    "half rotary": {"model__rotary_percent": 0.5, "model__qk_layernorm": False},
    "cosines": {"model__rotary_angles": "cosines"},
    "positions in documents": {**GPT2, "data__reset_position_ids": True, "data__reset_attention_mask": True},
}


def whole(name: str, parameter: torch.nn.Parameter, value: torch.Tensor, gated: bool, groups: Any) -> torch.Tensor:
    """The full tensor of a slice; a gated fc1 holds its gate and up halves interleaved by rank."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return value.clone()
    if "linear_fc1" in name and gated:
        return torch.cat([gather(half, 0, groups) for half in value.chunk(2)])
    return gather(value, getattr(parameter, "partition_dim", 0), groups)


def compute(rank: int, world_size: int) -> dict[str, Any]:
    from megatron_groupmates.model.batch import DocumentRules, pack_samples, training_batch
    from megatron_groupmates.model.gpt import build_gpt, packed_logits, token_embeddings, token_logits

    groups = open_groups(world_size)
    found = {}
    for variant, changes in VARIANTS.items():
        config = tiny_config("unused", model__init_std=0.3, parallel__tensor_model_parallel_size=world_size, **changes)
        gated = config.model.activation == "swiglu"
        model = build_gpt(config, groups, world_size, torch.float32)
        # Biases and norms as after some training, the same on both sizes.
        with torch.no_grad():
            for index, (name, parameter) in enumerate(model.named_parameters()):
                if parameter.ndim == 1:
                    full = whole(name, parameter, parameter, gated, groups)
                    drawn = full + 0.3 * torch.randn(full.shape, generator=torch.Generator().manual_seed(index))
                    parameter.copy_(slice_like(name, parameter, drawn, gated, groups))
        rules = DocumentRules.of(config, int(SAMPLES[0, 5]))
        batch = training_batch(SAMPLES, rules)
        logits = token_logits(model, batch.tokens, batch.attention_mask, batch.position_ids)
        token_losses(logits, batch.labels, groups.tensor_group).training_loss(0.0).backward()
        packed, _ = pack_samples(SAMPLES, rules)
        with torch.no_grad():
            parts = torch.cat([part for part, _ in packed_logits(model, packed, 11)], 1)
            words = token_embeddings(model, next_token_batch(SAMPLES)[0])
        found[variant] = {
            "logits": gather(logits.detach(), -1, groups),
            "packed": gather(parts, -1, groups).view(3, SEQUENCE_LENGTH, VOCABULARY),
            "words": words,
            "gradients": {name: whole(name, p, p.grad, gated, groups) for name, p in model.named_parameters()},
        }
    return found


def slice_like(name: str, parameter: torch.nn.Parameter, full: torch.Tensor, gated: bool, groups: Any) -> torch.Tensor:
    if full.shape == parameter.shape:
        return full
    rank, size = groups.tensor_rank, groups.tensor_size
    halves = full.chunk(2) if "linear_fc1" in name and gated else [full]
    return torch.cat([half.chunk(size)[rank] for half in halves])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield compute(0, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(compute, 2, tmp_path=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_compute_what_one_does(one, two, variant):
    alone = one[variant]
    for rank in two:
        shared = rank[variant]
        torch.testing.assert_close(shared["logits"], alone["logits"], rtol=0.0, atol=1e-4)
        torch.testing.assert_close(shared["words"], alone["words"])
        assert shared["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(
                shared["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_are_what_they_are_by_themselves(one, variant):
    torch.testing.assert_close(one[variant]["packed"], one[variant]["logits"], rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_as_many_as_counted(one, variant):
    config = tiny_config("unused", **VARIANTS[variant])
    assert model_size(config).parameters == sum(gradient.numel() for gradient in one[variant]["gradients"].values())


def test_each_option_changes_what_the_model_computes(one):
    logits = [one[variant]["logits"] for variant in VARIANTS]
    for index, first in enumerate(logits):
        assert all((first - second).abs().max() > 1e-2 for second in logits[:index])


def test_tied_weights_and_learned_positions_are_single_parameters(one):
    names = set(one["gpt2"]["gradients"])
    assert "output_layer.weight" not in names and "output_layer.weight" in one["tanh"]["gradients"]
    assert one["gpt2"]["gradients"]["embedding.position_embeddings.weight"].shape == (20, 32)
    assert {"decoder.final_layernorm.bias", "decoder.layers.1.mlp.linear_fc2.bias"} <= names
