"""What saves memory in training changes no gradient: sequence parallelism and recomputation, for each kind of architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_groupmates.model.losses import token_losses
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, open_groups, tiny_config

SAMPLES = torch.randint(VOCABULARY, (3, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(4))
DOCUMENTS = {"data__reset_attention_mask": True, "data__reset_position_ids": True, "data__eod_mask_loss": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "documents": DOCUMENTS,
    "gpt2": {
        "model__activation": "gelu",
        "model__normalization": "LayerNorm",
        "model__qk_layernorm": False,
        "model__add_bias_linear": True,
        "model__position_embedding_type": "learned_absolute",
        "model__untie_embeddings_and_output_weights": False,
        **DOCUMENTS,
    },
    "biases and norms of heads": {"model__add_bias_linear": True, "model__normalization": "LayerNorm"},
}
GRANULARITIES = ("none", "selective", "full")
WAYS = [(False, "none"), (False, "full"), *((True, granularity) for granularity in GRANULARITIES)]


def compute(rank: int, world_size: int) -> dict[str, Any]:
    groups = open_groups(world_size)
    return {name: {way: train_once(groups, *way, changes) for way in WAYS} for name, changes in ARCHITECTURES.items()}


def train_once(groups: Any, sequence_parallel: bool, granularity: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One backward pass: its loss and gradients, how often modules ran, and tokens that a layer's input has on this rank."""
    from megatron_groupmates.model import attention
    from megatron_groupmates.model.batch import DocumentRules, training_batch
    from megatron_groupmates.model.gpt import build_gpt, token_logits

    config = tiny_config(
        "unused",
        model__init_std=0.3,
        parallel__tensor_model_parallel_size=groups.tensor_size,
        parallel__sequence_parallel=sequence_parallel,
        training__recompute_granularity=granularity,
        **changes,
    )
    model = build_gpt(config, groups, groups.tensor_size, torch.float32, for_training=True)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1 and not getattr(parameter, "tensor_model_parallel", False):
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    tokens_of_input, attended = [], []
    model.decoder.layers[1].input_layernorm.register_forward_pre_hook(lambda module, inputs: tokens_of_input.append(len(inputs[0])))

    def attend(*arguments: Any, **options: Any) -> torch.Tensor:
        attended.append(len(tokens_of_input))
        return scaled_dot_product_attention(*arguments, **options)

    attention.scaled_dot_product_attention = attend
    batch = training_batch(SAMPLES, DocumentRules.of(config, int(SAMPLES[0, 5])))

    def loss() -> torch.Tensor:
        logits = token_logits(model, batch.tokens, batch.attention_mask, batch.position_ids)
        return token_losses(logits, batch.labels, groups.tensor_group).training_loss(0.1)

    with torch.no_grad():
        evaluated = loss().item()
    in_evaluation = {"norms of layer 1": len(tokens_of_input), "attention": len(attended)}
    trained = loss()
    trained.backward()
    return {
        "losses": (evaluated, trained.item()),
        "gradients": {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
        "in evaluation": in_evaluation,
        "in training and evaluation": {"norms of layer 1": len(tokens_of_input), "attention": len(attended)},
        "tokens": set(tokens_of_input),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(compute, 2, tmp_path=tmp_path_factory.mktemp("ranks"), timeout_seconds=120)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequence_parallelism_shares_tokens_and_keeps_every_gradient(ranks: list[dict[str, Any]], architecture: str):
    for rank in ranks:
        plain, shared = rank[architecture][False, "none"], rank[architecture][True, "none"]
        assert (plain["tokens"], shared["tokens"]) == ({SEQUENCE_LENGTH}, {SEQUENCE_LENGTH // 2})
        assert shared["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        for name, gradient in plain["gradients"].items():
            assert float(gradient.norm()) > 0
            assert float((shared["gradients"][name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputation_changes_no_bit(ranks: list[dict[str, Any]], architecture: str):
    for rank in ranks:
        for sequence_parallel, granularity in WAYS:
            plain, again = rank[architecture][sequence_parallel, "none"], rank[architecture][sequence_parallel, granularity]
            assert again["losses"] == plain["losses"] and again["tokens"] == plain["tokens"]
            for name, gradient in plain["gradients"].items():
                assert torch.equal(again["gradients"][name], gradient), (granularity, name)


@pytest.mark.parametrize(("granularity", "norms", "attention"), [("none", 1, 2), ("selective", 1, 4), ("full", 2, 4)])
def test_what_is_recomputed_runs_twice_and_only_in_training(ranks: list[dict[str, Any]], granularity: str, norms: int, attention: int):
    """Attention of both layers of the model, the first norm of one."""
    result = ranks[0]["documents"][True, granularity]
    assert result["in evaluation"] == {"norms of layer 1": 1, "attention": 2}
    assert result["in training and evaluation"] == {"norms of layer 1": 1 + norms, "attention": 2 + attention}
