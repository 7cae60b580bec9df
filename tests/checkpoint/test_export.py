"""The mapping of our GPT onto Qwen3, against explicit indexing and transformers' own parameter list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.checkpoint.export import (
    check_architecture,
    check_parameters,
    exported_tensors,
    has_fused_norms,
    hugging_face_config,
    split_qkv,
)
from megatron_groupmates.checkpoint.export_directory import ExportOptions, config_of_checkpoint, shards
from megatron_groupmates.config.errors import UserError
from tests.common.configs import tiny_config


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_split_qkv_is_explicit_indexing(groups: int, per_group: int, head: int) -> None:
    fused = torch.arange(groups * (per_group + 2) * head * 2).view(-1, 2)
    rows = iter(fused)
    expected: tuple[list[torch.Tensor], ...] = ([], [], [])
    for _ in range(groups):
        for part, heads in enumerate((per_group, 1, 1)):
            expected[part].extend(next(rows) for _ in range(heads * head))
    for part, wanted in zip(split_qkv(fused, groups, per_group, head), expected, strict=True):
        assert torch.equal(part, torch.stack(wanted))


@pytest.mark.parametrize("query_groups", [None, 1, 2])
def test_names_and_shapes_are_those_of_the_stock_model(query_groups: int | None) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = tiny_config(model={"num_query_groups": query_groups, "rotary_base": 700})
    described = Qwen3Config(**hugging_face_config(config, 300, torch.float32, 0))
    assert described.rope_parameters["rope_theta"] == 700.0 and described.rms_norm_eps == 1e-5
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(described)
    exported = {tensor.name: tensor.shape for tensor in exported_tensors(config, 300, fused_norms=False)}
    assert exported == {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}


def test_cuts_have_the_shapes_they_promise_and_neighbours_share_parameters() -> None:
    tensors = exported_tensors(tiny_config(model={"num_query_groups": 2}), 300, fused_norms=False)
    for tensor in tensors:
        assert tensor.cut(torch.zeros(tensor.source_shape)).shape == tensor.shape, tensor.name
    sources = [tensor.source for tensor in tensors]
    assert all(len(set(sources[sources.index(source) : sources.index(source) + sources.count(source)])) == 1 for source in sources)


def test_transformer_engine_names_carry_the_norms() -> None:
    config = tiny_config()
    plain, fused = (exported_tensors(config, 320, fused_norms=choice) for choice in (False, True))
    assert not has_fused_norms([tensor.source for tensor in plain]) and has_fused_norms([tensor.source for tensor in fused])
    moved = {ours.name: theirs.source for ours, theirs in zip(plain, fused, strict=True) if ours.source != theirs.source}
    assert moved == {
        f"model.layers.{layer}.{name}": f"decoder.layers.{layer}.{source}.layer_norm_weight"
        for layer in range(2)
        for name, source in (
            ("input_layernorm.weight", "self_attention.linear_qkv"),
            ("post_attention_layernorm.weight", "mlp.linear_fc1"),
        )
    }


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activation", "gelu"),
        ("normalization", "LayerNorm"),
        ("qk_layernorm", False),
        ("add_bias_linear", True),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("rotary_angles", "cosines"),
        ("untie_embeddings_and_output_weights", False),
    ],
)
def test_another_architecture_is_refused_by_its_setting(setting: str, value: object) -> None:
    check_architecture(tiny_config())
    with pytest.raises(UserError, match=rf"model\.{setting}: {value}: the export is to Qwen3ForCausalLM"):
        check_architecture(tiny_config(model={setting: value}))


def test_a_model_with_biases_or_without_qk_norms_is_refused() -> None:
    tensors = exported_tensors(tiny_config(), 320, fused_norms=False)
    shapes = {tensor.source: tensor.source_shape for tensor in tensors}
    check_parameters(tensors, list(shapes), shapes.__getitem__, "here")
    bias = {**shapes, "decoder.layers.0.mlp.linear_fc2.bias": (32,)}
    with pytest.raises(UserError, match=r"here has a parameter 'decoder.layers.0.mlp.linear_fc2.bias'.*Qwen3 has no place for"):
        check_parameters(tensors, list(bias), bias.__getitem__, "here")
    plain = {name: shape for name, shape in shapes.items() if "q_layernorm" not in name}
    with pytest.raises(UserError, match=r"here has no parameter 'decoder.layers.0.self_attention.q_layernorm.weight'"):
        check_parameters(tensors, list(plain), plain.__getitem__, "here")


def test_shards_stay_below_the_size_and_lose_nothing() -> None:
    tensors = exported_tensors(tiny_config(), 320, fused_norms=False)
    files, index = shards(tensors, ExportOptions(dtype="bfloat16", max_shard_size="30KB"))
    sizes = {tensor.name: 2 * torch.Size(tensor.shape).numel() for tensor in tensors}
    assert len(files) > 2 and [name for names in files.values() for name in names] == list(sizes)
    assert all(sum(sizes[name] for name in names) <= 30_000 for names in files.values())
    assert index["metadata"]["total_size"] == sum(sizes.values()) and set(index["weight_map"]) == set(sizes)


@pytest.mark.parametrize(
    ("state", "message"),
    [({}, "does not hold its run's config; give it"), ({"config": {"runs": {}}}, "cannot be used: runs: unknown setting")],
)
def test_a_checkpoint_without_a_usable_config(state: dict, message: str) -> None:
    class Checkpoint:
        path, client_state = "here", state

    with pytest.raises(UserError, match=message):
        config_of_checkpoint(Checkpoint())
