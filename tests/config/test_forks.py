"""The settings of a run in a checkout of Megatron-DeepSpeed or Megatron-LM, and what is refused by its flag."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron_groupmates.config import Config, UserError, config_from_dict, learning_rate
from megatron_groupmates.config.forks import left_out_of_oracles, settings_of_megatron_deepspeed, settings_of_megatron_lm

COMMON: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 16,
    "max_position_embeddings": 20,
    "padded_vocab_size": 64,
    "train_iters": 10,
    "train_samples": None,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_decay_style": "cosine",
    "save": "checkpoints",
    "clip_grad": 1.0,
    "optimizer": "adam",
}
MEGATRON_DEEPSPEED = {
    **COMMON,
    "num_experts": [1],
    "num_key_value_heads": 4,
    "no_pipeline_parallel": True,
    "bias_gelu_fusion": True,
    "normalization": "layernorm",
    "pipeline_model_parallel_size": 1,
    "deepspeed_config_dict": {"train_batch_size": 4, "gradient_clipping": 0.25, "zero_optimization": {"stage": 2}},
}
LLAMA = {
    "swiglu": True,
    "normalization": "rmsnorm",
    "add_bias_linear": False,
    "use_rotary_position_embeddings": True,
    "untie_embeddings_and_output_weights": True,
}
MEGATRON_LM = {**COMMON, "position_embedding_type": "learned_absolute", "bias_gelu_fusion": True, "num_experts": None}


def of_deepspeed(**changes: Any) -> Config:
    return checked(settings_of_megatron_deepspeed(argparse.Namespace(**(MEGATRON_DEEPSPEED | changes))))


def of_lm(**changes: Any) -> Config:
    return checked(settings_of_megatron_lm(MEGATRON_LM | changes))


def checked(tree: dict[str, dict[str, Any]]) -> Config:
    return config_from_dict(tree | {"run": {"output_dir": "run"}, "data": tree["data"] | {"pool": "pool"}})


def test_a_gpt_2_of_megatron_deepspeed():
    config = of_deepspeed()
    model = config.model
    assert (model.activation, model.normalization, model.position_embedding_type) == ("gelu_tanh", "LayerNorm", "learned_absolute")
    assert (model.max_position_embeddings, model.vocab_size, model.ffn_hidden_size, model.sequence_length) == (20, 64, 128, 16)
    assert model.add_bias_linear and not model.qk_layernorm and not model.untie_embeddings_and_output_weights
    assert (config.checkpoint.format, config.checkpoint.directory) == ("megatron_deepspeed", "checkpoints")
    assert config.optimizer.zero_stage == 2


def test_deepspeed_clips_by_its_own_config():
    assert of_deepspeed().training.gradient_clipping == 0.25
    assert of_deepspeed(deepspeed_config_dict={}).training.gradient_clipping == 0.0
    assert of_lm().training.gradient_clipping == 1.0


def test_zero_3_leaves_no_weight_decay():
    assert [of_deepspeed(weight_decay=0.1, zero_stage=stage).optimizer.weight_decay for stage in (1, 2, 3)] == [0.1, 0.1, 0.0]


def test_a_llama_of_megatron_deepspeed():
    model = of_deepspeed(**LLAMA, rope_theta=500, rotary_percent=0.5).model
    assert (model.activation, model.normalization, model.position_embedding_type) == ("swiglu", "RMSNorm", "rope")
    assert (model.rotary_base, model.rotary_percent, model.rotary_angles) == (500, 0.5, "cosines")
    assert model.untie_embeddings_and_output_weights and not model.add_bias_linear and model.max_position_embeddings is None
    older = settings_of_megatron_deepspeed(MEGATRON_DEEPSPEED | LLAMA, rotary_angles="positions")
    assert checked(older).model.rotary_angles == "positions"


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, "gelu"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        ({"swiglu": True}, "swiglu"),
    ],
)
def test_activations_of_megatron_deepspeed(changes, activation):
    assert of_deepspeed(**changes).model.activation == activation


def test_precision():
    assert [of_deepspeed(**changes).training.precision for changes in ({}, {"fp16": True}, {"bf16": True})] == ["fp32", "fp32", "bf16"]
    by_deepspeed = MEGATRON_DEEPSPEED["deepspeed_config_dict"] | {"bf16": {"enabled": True}}
    assert of_deepspeed(deepspeed_config_dict=by_deepspeed).training.precision == "bf16"


def test_rules_about_documents_are_those_that_the_checkout_obeys():
    rules = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}

    def found(**changes: Any) -> tuple[bool, bool, bool]:
        data = of_deepspeed(**rules, **changes).data
        return data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss

    assert found() == (True, True, True)
    assert found(**LLAMA) == (False, True, True), "rotary angles do not follow position ids there"
    assert found(use_flash_attn_v2=True) == (True, False, True), "flash attention takes no mask there"


def test_a_model_of_megatron_lm():
    model = of_lm(
        position_embedding_type="rope",
        swiglu=True,
        normalization="RMSNorm",
        qk_layernorm=True,
        group_query_attention=True,
        num_query_groups=2,
        add_bias_linear=False,
        rotary_base=5000,
        untie_embeddings_and_output_weights=True,
    ).model
    assert (model.activation, model.normalization, model.position_embedding_type) == ("swiglu", "RMSNorm", "rope")
    assert (model.num_query_groups, model.rotary_base, model.qk_layernorm, model.rotary_angles) == (2, 5000, True, "positions")
    assert of_lm(num_query_groups=1).model.num_query_groups is None
    assert [of_lm(bias_gelu_fusion=fused).model.activation for fused in (True, False)] == ["gelu_tanh", "gelu"]


def test_schedules_as_plans_show_them():
    config = of_lm(lr_decay_style="linear", lr_warmup_iters=2, lr_decay_iters=8)
    rates = [learning_rate(config, step) for step in (1, 2, 5, 8, 9)]
    assert rates == pytest.approx([5e-3, 1e-2, 5.5e-3, 1e-3, 1e-3])
    by_samples = of_lm(train_iters=None, train_samples=40, lr_warmup_fraction=0.2, lr_decay_samples=40)
    assert (by_samples.training.train_iters, by_samples.optimizer.warmup_iters, by_samples.optimizer.decay_iters) == (10, 2, 10)
    assert of_lm(lr_decay_style="inverse-square-root").optimizer.schedule == "constant"


def test_what_oracles_leave_out_is_said():
    lines = left_out_of_oracles({"hidden_dropout": 0.1, "attention_dropout": 0.0, "fp16": True})
    assert [line.split(":")[0] for line in lines] == ["--hidden-dropout 0.1", "--fp16"]
    assert left_out_of_oracles(COMMON) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_experts": [4]}, ["--num-experts: [4]", "mixture of experts"]),
        ({"num_key_value_heads": 2}, ["--num-key-value-heads: 2", "grouped-query attention"]),
        ({"kv_channels": 16}, ["--kv-channels: 16", "32 / 4"]),
        ({"apply_residual_connection_post_layernorm": True}, ["--apply-residual-connection-post-layernorm: True"]),
        ({"squared_relu": True}, ["--squared-relu: True"]),
        ({"apply_layernorm_1p": True}, ["--apply-layernorm-1p: True"]),
        ({"optimizer": "sgd"}, ["--optimizer: 'sgd'"]),
        ({"weight_decay_incr_style": "cosine"}, ["--weight-decay-incr-style: 'cosine'"]),
        ({"rampup_batch_size": ["4", "4", "8"]}, ["--rampup-batch-size"]),
        ({"pipeline_model_parallel_size": 2}, ["--pipeline-model-parallel-size: 2"]),
        ({"no_pipeline_parallel": False}, ["--no-pipeline-parallel", "pipeline engine"]),
        ({"num_layers_per_virtual_pipeline_stage": 1}, ["--num-layers-per-virtual-pipeline-stage: 1"]),
        ({"add_position_embedding": False}, ["--no-position-embedding"]),
        ({"sequence_parallel": True}, ["--sequence-parallel: True", "learned positions"]),
        ({"ds_sequence_parallel_size": 2}, ["--ds-sequence-parallel-size: 2"]),
        ({"data_efficiency_curriculum_learning": True}, ["--data-efficiency-curriculum-learning: True"]),
        ({"random_ltd": True}, ["--random-ltd: True"]),
        ({"mos": True}, ["--mos: True", "distillation"]),
        ({"use_alibi": True}, ["--use-alibi: True", "ALiBi"]),
        ({"deepspeed_config_dict": None}, ["deepspeed_config_dict", "--deepspeed_config"]),
        ({"padded_vocab_size": None}, ["no padded_vocab_size"]),
    ],
)
def test_megatron_deepspeed_refusals_name_the_flag_and_its_value(changes, parts):
    with pytest.raises(UserError) as caught:
        of_deepspeed(**changes)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_experts": 8}, ["--num-experts: 8"]),
        ({"position_embedding_type": "yarn"}, ["--position-embedding-type: 'yarn'"]),
        ({"multi_latent_attention": True}, ["--multi-latent-attention: True"]),
        ({"use_rope_scaling": True}, ["--use-rope-scaling: True"]),
        ({"softmax_type": "learnable"}, ["--softmax-type: 'learnable'"]),
        ({"glu_linear_offset": 1.0}, ["--glu-linear-offset: 1.0"]),
        ({"context_parallel_size": 2}, ["--context-parallel-size: 2"]),
        ({"mtp_num_layers": 1}, ["--mtp-num-layers: 1"]),
    ],
)
def test_megatron_lm_refusals_name_the_flag_and_its_value(changes, parts):
    with pytest.raises(UserError) as caught:
        of_lm(**changes)
    for part in parts:
        assert part in str(caught.value)
    assert "would measure the losses of another model" in str(caught.value)
