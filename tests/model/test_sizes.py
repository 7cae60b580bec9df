"""Counts from the config alone equal those of the real model and of hand arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_groupmates.model.sizes import model_size, training_bytes_per_gpu
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


def test_tensor_parallelism_divides_everything():
    whole = training_bytes_per_gpu(tiny_config("unused"), 1)
    half = training_bytes_per_gpu(tiny_config("unused", parallel__tensor_model_parallel_size=2), 1)
    assert {part: size // 2 for part, size in whole.items()} == half
