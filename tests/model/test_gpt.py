"""The GPT computes the same on one and on two tensor-parallel ranks; its attention equals plain softmax attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_groupmates.model.losses import next_token_batch, token_losses
from megatron_groupmates.model.sizes import model_size
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, one_rank, open_groups, tiny_config

SAMPLES = torch.randint(VOCABULARY, (3, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(4))


def gather(value: torch.Tensor, dimension: int, groups: Any) -> torch.Tensor:
    parts = [torch.empty_like(value) for _ in range(groups.tensor_size)]
    torch.distributed.all_gather(parts, value.contiguous(), group=groups.tensor_group)
    return torch.cat(parts, dimension)


def whole(name: str, parameter: torch.nn.Parameter, value: torch.Tensor, groups: Any) -> torch.Tensor:
    """The full tensor of a slice; fc1 holds its gate and up halves interleaved by rank."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return value.clone()
    if name.endswith("linear_fc1.weight"):
        return torch.cat([gather(half, 0, groups) for half in value.chunk(2)])
    return gather(value, parameter.partition_dim, groups)


def compute(rank: int, world_size: int) -> dict[str, Any]:
    from megatron_groupmates.model.gpt import build_gpt, hidden_states, token_logits

    groups = open_groups(world_size)
    # Large weights, so that attention is far from uniform.
    config = tiny_config("unused", model__init_std=0.3, parallel__tensor_model_parallel_size=world_size)
    model = build_gpt(config, groups, world_size, torch.float32)
    tokens, labels = next_token_batch(SAMPLES)
    weights = {name: whole(name, p, p.detach(), groups) for name, p in model.named_parameters()}
    hidden = hidden_states(model, tokens)
    logits = token_logits(model, tokens)
    token_losses(logits, labels, groups.tensor_group).training_loss(0.1).backward()
    changed = tokens.clone()
    changed[:, 9:] = 7
    with torch.no_grad():
        later = gather(token_logits(model, changed), -1, groups)
    return {
        "logits": gather(logits.detach(), -1, groups),
        "later": later,
        "hidden": hidden,
        "weights": weights,
        "gradients": {name: whole(name, p, p.grad, groups) for name, p in model.named_parameters()},
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield compute(0, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(compute, 2, tmp_path=tmp_path_factory.mktemp("ranks"))


def test_initial_weights_do_not_depend_on_the_tensor_parallel_size(one, two):
    assert one["weights"].keys() == two[0]["weights"].keys()
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two[0]["weights"][name]), name


def test_parameters_of_both_ranks_are_those_of_the_config(two):
    expected = model_size(tiny_config("unused")).parameters
    assert [sum(weight.numel() for weight in rank["weights"].values()) for rank in two] == [expected, expected]


def test_logits_are_the_same_on_one_and_two_ranks(one, two):
    assert float(one["logits"].std()) > 0.1
    torch.testing.assert_close(two[0]["logits"], one["logits"], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_on_one_and_two_ranks(one, two):
    norms = [name for name in one["gradients"] if "q_layernorm" in name or "k_layernorm" in name]
    assert len(norms) == 4
    for name, gradient in one["gradients"].items():
        assert float(gradient.abs().max()) > 0, name
        for rank in two:
            error = (rank["gradients"][name] - gradient).norm() / gradient.norm()
            assert float(error) < 2e-5, name


def test_hidden_states_are_the_same_on_every_rank(one, two):
    assert one["hidden"].shape == (SEQUENCE_LENGTH, 3, 32)
    assert torch.equal(two[0]["hidden"], two[1]["hidden"])
    torch.testing.assert_close(two[0]["hidden"], one["hidden"], rtol=1e-5, atol=1e-5)


def test_hidden_states_leave_a_model_that_gives_logits(one):
    # The logits were taken after the hidden states, and are those of the output layer on them.
    expected = one["hidden"].transpose(0, 1) @ one["weights"]["output_layer.weight"].T
    torch.testing.assert_close(one["logits"], expected, rtol=1e-5, atol=1e-5)


def test_logits_depend_on_earlier_tokens_alone(one):
    torch.testing.assert_close(one["later"][:, :9], one["logits"][:, :9], rtol=1e-5, atol=1e-5)
    assert float((one["later"][:, 9:] - one["logits"][:, 9:]).abs().max()) > 1e-3


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Softmax attention in float64, head by head; ``hidden`` bool ``[b, s, s]``."""
    s, b, n, d = query.shape
    out = torch.empty(s, b, n, d, dtype=torch.float64)
    for batch in range(b):
        for head in range(n):
            group = head // (n // key.shape[2])
            q, k, v = query[:, batch, head].double(), key[:, batch, group].double(), value[:, batch, group].double()
            scores = (q @ k.T / d**0.5).masked_fill(hidden[batch], float("-inf"))
            out[:, batch, head] = scores.softmax(-1) @ v
    return out.reshape(s, b, n * d)


@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("explicit_mask", [False, True])
def test_attention_equals_plain_softmax(one, num_groups, explicit_mask):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_groupmates.model.attention import SDPACoreAttention

    s, b, n, d = 6, 2, 4, 8
    config = TransformerConfig(
        num_layers=1, hidden_size=n * d, num_attention_heads=n, num_query_groups=num_groups, hidden_dropout=0.0, attention_dropout=0.0
    )
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(num_groups)
    query = torch.randn(s, b, n, d, generator=generator)
    key, value = (torch.randn(s, b, num_groups, d, generator=generator) for _ in range(2))
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1).repeat(b, 1, 1)
    if explicit_mask:
        hidden[1, 3:, :2] = True
    found = attention(query, key, value, hidden.unsqueeze(1) if explicit_mask else None)
    assert found.dtype == query.dtype
    torch.testing.assert_close(found.double(), plain_attention(query, key, value, hidden), rtol=1e-5, atol=1e-6)


def test_attention_refuses_what_it_cannot_do():
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_groupmates.model.attention import SDPACoreAttention

    def config(dropout: float) -> TransformerConfig:
        return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=dropout)

    with pytest.raises(AssertionError, match="no dropout"):
        SDPACoreAttention(config(0.1), 1, AttnMaskType.causal, "self")
    x = torch.randn(3, 1, 2, 4)
    with pytest.raises(AssertionError, match="not supported"):
        SDPACoreAttention(config(0.0), 1, AttnMaskType.causal, "self")(x, x, x, None, attention_bias=x)
