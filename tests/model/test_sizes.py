"""Counts from the config alone equal those of the real model and of hand arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_groupmates.model.sizes import model_size, recomputed_flops_per_token, training_bytes_per_gpu
from tests.common.gpt_runs import one_rank, tiny_config

SHAPES: list[dict[str, Any]] = [
    {},
    {"model__num_query_groups": None},
    {"model__num_layers": 3, "model__hidden_size": 48, "model__ffn_hidden_size": None, "model__vocab_size": 260},
]


def test_parameters_equal_the_model_of_one_rank(tmp_path):
    from megatron_groupmates.model.gpt import build_gpt

    with one_rank(tmp_path) as groups:
        for shape in SHAPES:
            config = tiny_config("unused", **shape)
            model = build_gpt(config, groups, 1, torch.float32)
            assert model_size(config).parameters == sum(p.numel() for p in model.parameters()), shape


def test_floating_point_operations_by_hand():
    size = model_size(tiny_config("unused"))
    h, groups, head, ffn, vocabulary, layers, s = 32, 2, 8, 48, 256, 2, 16
    matrices = layers * (h * (h + 2 * groups * head) + h * h + 3 * h * ffn) + vocabulary * h
    pairs = sum(position + 1 for position in range(s))
    assert size.matrix_parameters == matrices
    assert size.attention_flops_per_token == layers * pairs * 4 * h // s
    assert size.forward_flops_per_token == 2 * matrices + size.attention_flops_per_token
    assert size.training_flops_per_token == 3 * size.forward_flops_per_token


@pytest.mark.parametrize(
    ("stage", "divided"), [(0, ()), (1, ("optimizer",)), (2, ("optimizer", "gradients")), (3, ("optimizer", "gradients", "weights"))]
)
def test_zero_divides_its_parts_over_data_parallel_ranks(stage, divided):
    config = tiny_config("unused", optimizer__zero_stage=stage, selection__enabled=False)
    alone, spread = training_bytes_per_gpu(config, 1), training_bytes_per_gpu(config, 4)
    assert alone["optimizer"] == 12 * model_size(config).parameters and alone["weights"] == 2 * model_size(config).parameters
    for part, size in alone.items():
        assert spread[part] == (size // 4 if part in divided else size)


def test_zero_3_holds_gathered_weights_up_to_a_limit():
    for layers, gathered in ((2, None), (8000, 10**9)):
        config = tiny_config("unused", model__num_layers=layers, model__hidden_size=256, optimizer__zero_stage=3)
        expected = gathered or model_size(config).parameters
        assert training_bytes_per_gpu(config, 4)["gathered"] == 2 * expected <= 2 * model_size(config).parameters
    assert "gathered" not in training_bytes_per_gpu(tiny_config("unused", optimizer__zero_stage=2), 4)


def test_tensor_parallelism_divides_all_but_ten_bytes_of_the_activations_and_sequence_parallelism_these_too():
    def bytes_of(**changes: Any) -> dict[str, int]:
        return training_bytes_per_gpu(tiny_config("unused", **changes), 1)

    tensor = {"parallel__tensor_model_parallel_size": 2}
    whole, half, shared = bytes_of(), bytes_of(**tensor), bytes_of(**tensor, parallel__sequence_parallel=True)
    assert {part: size // 2 for part, size in whole.items()} == shared
    batch, s, h, layers = 4, 16, 32, 2
    assert half["activations"] - shared["activations"] == batch * s * h * layers * 5
    assert {**half, "activations": 0} == {**shared, "activations": 0}
    assert bytes_of(parallel__sequence_parallel=True) == whole


@pytest.mark.parametrize(("sequence_parallel", "input_bytes", "layer_bytes"), [(False, 2, 22), (True, 1, 17)])
def test_recomputed_layers_keep_their_inputs(sequence_parallel, input_bytes, layer_bytes):
    parallel = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": sequence_parallel}
    sizes = {
        granularity: training_bytes_per_gpu(tiny_config("unused", training__recompute_granularity=granularity, **parallel), 1)
        for granularity in ("none", "selective", "full")
    }
    batch, s, h, layers = 4, 16, 32, 2
    logits = batch * s * 256 * 8 // 2
    assert sizes["selective"] == sizes["none"]
    assert sizes["none"]["activations"] == batch * s * h * layers * layer_bytes + logits
    assert sizes["full"]["activations"] == batch * s * h * (layers * input_bytes + layer_bytes) + logits


def test_what_is_computed_again():
    size = model_size(tiny_config("unused"))
    again = {
        granularity: recomputed_flops_per_token(tiny_config("unused", training__recompute_granularity=granularity))
        for granularity in ("none", "selective", "full")
    }
    assert again == {
        "none": 0,
        "selective": size.attention_flops_per_token,
        "full": size.forward_flops_per_token - 2 * 256 * 32,
    }
