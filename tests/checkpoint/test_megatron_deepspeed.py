"""A Megatron-DeepSpeed checkout's own checkpoints, read under megatron-core's names and in its layout, at any tensor-parallel size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_groupmates.checkpoint.discovery import check_complete, load_model_state
from megatron_groupmates.checkpoint.layout import layout_of, split
from megatron_groupmates.checkpoint.megatron_deepspeed import MegatronDeepSpeedCheckpoint, megatron_core_name, query_key_value_pieces
from megatron_groupmates.checkpoint.partitions import KINDS, model_parameters
from megatron_groupmates.config import UserError
from tests.common.forks import BFLOAT16, DATA, STEP, VARIANTS, arguments, tag_dir, whole
from tools.bench.synthetic_zero import write_checkpoint

LR_OF_NEXT_STEP = 3.25e-3


def saved_module(variant: str) -> dict[str, torch.Tensor]:
    """The module that the checkout saved beside the optimizer, whole, under megatron-core's names."""
    args = arguments(variant)
    ranks = range(args["tensor_model_parallel_size"])
    states = [model_parameters(load_model_state(tag_dir(variant) / f"mp_rank_{rank:02d}_model_states.pt")) for rank in ranks]
    return {
        megatron_core_name(name): whole(name, [state[name] for state in states], args["num_attention_heads"], args["swiglu"])
        for name in states[0]
    }


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if not variant.endswith("zero3")])
def test_weights_are_the_checkouts(variant):
    checkpoint, module = MegatronDeepSpeedCheckpoint(tag_dir(variant)), saved_module(variant)
    assert set(checkpoint.names) == set(module)
    for name, value in module.items():
        found = checkpoint.read(name, "param")
        assert checkpoint.shape(name) == tuple(value.shape) and found.dtype == torch.float32
        # The float32 masters of a bfloat16 run, of which its module holds the rounded values.
        assert torch.equal(found.to(value.dtype), value), name
    assert module["embedding.word_embeddings.weight"].dtype == (torch.bfloat16 if variant == BFLOAT16 else torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_of_any_size_are_those_of_the_whole(variant, size):
    checkpoint = MegatronDeepSpeedCheckpoint(tag_dir(variant))
    for name in checkpoint.names:
        rule = layout_of(name, variant.startswith("llama"))
        for kind in KINDS:
            full = checkpoint.read(name, kind)
            for rank in range(size):
                assert torch.equal(checkpoint.read_slice(name, kind, rank, size), split(full, rule, rank, size)), (name, kind, rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_server_asks(variant):
    check_complete(tag_dir(variant))
    checkpoint = MegatronDeepSpeedCheckpoint(tag_dir(variant))
    assert (checkpoint.step, checkpoint.adam_step, checkpoint.consumed_train_samples) == (STEP, STEP, 4 * STEP)
    assert checkpoint.next_learning_rate == pytest.approx(LR_OF_NEXT_STEP)
    assert checkpoint.client_state["gated_linear_unit"] is variant.startswith("llama")
    groups = checkpoint.param_groups
    # Under ZeRO-3 every parameter is a vector to the checkout, and it decays no vectors.
    assert [group["weight_decay"] for group in groups] == ([0.0] if variant.endswith("zero3") else [0.1, 0.0])
    assert {name for group in groups for name in group["param_names"]} == set(checkpoint.names)
    assert "decoder.layers.1.mlp.linear_fc1.weight" in groups[0]["param_names"]
    assert "decoder.final_layernorm.weight" in groups[-1]["param_names"]


def test_the_saved_arguments_and_random_states_are_data():
    state = MegatronDeepSpeedCheckpoint(tag_dir("gpt-tp2-zero1")).client_state
    assert state["args"].type_name == "argparse.Namespace" and state["args"].fields["params_dtype"] == torch.float32
    assert state["rng_state"][0]["torch_rng_state"].dtype == torch.uint8


def test_what_oracles_leave_out_is_read_from_the_arguments():
    checkpoint = MegatronDeepSpeedCheckpoint(tag_dir("gpt-dp2-zero2"))
    assert checkpoint.left_out_of_oracles == []
    checkpoint.client_state["args"].fields["hidden_dropout"] = 0.1
    assert checkpoint.left_out_of_oracles == ["--hidden-dropout 0.1: oracles are measured without dropout"]


def test_pieces_of_queries_keys_and_values_by_hand():
    # Two ranks of two heads of one row: [q0 q1 k0 k1 v0 v1] and [q2 q3 k2 k3 v2 v3].
    held = [[f"{part}{head}" for part in "qkv" for head in heads] for heads in ((0, 1), (2, 3))]

    def read(rank: int, size: int) -> list[str]:
        pieces = query_key_value_pieces(12, 4, 2, rank, size)
        return [row for piece in pieces for row in held[piece.rank][piece.start : piece.start + piece.length]]

    assert read(0, 1) == [f"{part}{head}" for head in range(4) for part in "qkv"]
    assert read(1, 2) == ["q2", "k2", "v2", "q3", "k3", "v3"]
    assert read(2, 4) == ["q2", "k2", "v2"]
    with pytest.raises(UserError, match="4 attention heads cannot be divided over 3 tensor-parallel ranks"):
        read(0, 3)


def test_other_parameters_and_other_trainers_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'language_model\.encoder\.layers\.0\.mlp\.deepspeed_moe\.gate\.wg\.weight' is not one of"):
        megatron_core_name("language_model.encoder.layers.0.mlp.deepspeed_moe.gate.wg.weight")
    own = write_checkpoint(tmp_path, {"output_layer.weight": ((4, 2), 0)}, 1, 1, {})
    with pytest.raises(UserError, match=r"was not saved by Megatron-DeepSpeed: .*checkpoint\.format"):
        MegatronDeepSpeedCheckpoint(own)


def test_the_pipeline_engines_layout_is_refused_by_name(tmp_path: Path):
    tag = shutil.copytree(tag_dir("gpt-dp2-zero2"), tmp_path / f"global_step{STEP}")
    (tag / "layer_01-model_00-model_states.pt").touch()
    with pytest.raises(UserError, match=r"pipeline engine .*layer_NN-model_MM.*--no-pipeline-parallel"):
        MegatronDeepSpeedCheckpoint(tag)


def test_the_files_are_few_and_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 1_000_000
