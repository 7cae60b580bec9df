"""The settings of a run whose trainer is a checkout of Megatron-DeepSpeed or Megatron-LM, from that checkout's arguments.

Pure functions. The selection server measures oracles on its own GPT with the checkpoint's weights, so every argument that
changes what the model computes either becomes a setting of ours or is refused by its flag and value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from megatron_groupmates.config.errors import UserError

Sections = dict[str, dict[str, Any]]

# (attribute, flag, values that leave the model as the server has it, what another value is)
_Rule = tuple[str, str, tuple[Any, ...], str]

_OFF = (None, False)
_ONE = (None, 1)
_UNSET = (None,)
_COMMON_RULES: tuple[_Rule, ...] = (
    ("apply_layernorm_1p", "--apply-layernorm-1p", _OFF, "norms whose weights are centred around zero"),
    ("apply_residual_connection_post_layernorm", "--apply-residual-connection-post-layernorm", _OFF, "residuals taken after the norm"),
    ("squared_relu", "--squared-relu", _OFF, "squared ReLU"),
    ("onnx_safe", "--onnx-safe", _OFF, "the activation for ONNX"),
    ("rampup_batch_size", "--rampup-batch-size", (None, []), "batches of growing size"),
    ("weight_decay_incr_style", "--weight-decay-incr-style", (None, "constant"), "weight decay that changes in the run"),
    ("optimizer", "--optimizer", (None, "adam", "Adam", "adamw"), "another optimizer than Adam"),
    ("retro_add_retriever", "--retro-add-retriever", _OFF, "Retro"),
    ("embed_layernorm", "--embed-layernorm", _OFF, "a norm of the embeddings"),
    ("use_alibi", "--use-alibi", _OFF, "ALiBi"),
    ("fp16_lm_cross_entropy", "--fp16-lm-cross-entropy", _OFF, "the loss in fp16"),
)
_MEGATRON_DEEPSPEED_RULES: tuple[_Rule, ...] = (
    ("pipeline_model_parallel_size", "--pipeline-model-parallel-size", _ONE, "pipeline parallelism, whose checkpoints are not read"),
    ("num_layers_per_virtual_pipeline_stage", "--num-layers-per-virtual-pipeline-stage", _UNSET, "virtual pipeline stages"),
    ("num_experts", "--num-experts", (None, 1, [1], (1,)), "mixture of experts"),
    ("num_experts_switch", "--num-experts-switch", _UNSET, "mixture of experts"),
    ("ds_sequence_parallel_size", "--ds-sequence-parallel-size", _ONE, "DeepSpeed's sequence parallelism"),
    ("force_ds_sequence_parallel", "--force-ds-sequence-parallel", _OFF, "DeepSpeed's sequence parallelism"),
    ("ds_sequence_parallel_fpdt", "--ds-sequence-parallel-fpdt", _OFF, "DeepSpeed's chunked sequence parallelism"),
    ("curriculum_learning_legacy", "curriculum_learning of the DeepSpeed config", _OFF, "sequences of growing length"),
    ("data_efficiency_curriculum_learning", "--data-efficiency-curriculum-learning", _OFF, "sequences of growing length"),
    ("random_ltd", "--random-ltd", _OFF, "random layer-wise token dropping"),
    ("compression_training", "compression_training of the DeepSpeed config", _OFF, "compression in training"),
    ("mos", "--mos", _OFF, "distillation"),
    ("kd", "--kd", _OFF, "distillation"),
)
_MEGATRON_LM_RULES: tuple[_Rule, ...] = (
    ("num_experts", "--num-experts", (None, 1), "mixture of experts"),
    ("spec", "--spec", (None, []), "layers of a specification of your own"),
    ("multi_latent_attention", "--multi-latent-attention", _OFF, "multi-latent attention"),
    ("rotary_interleaved", "--rotary-interleaved", _OFF, "interleaved rotary embeddings"),
    ("rotary_seq_len_interpolation_factor", "--rotary-seq-len-interpolation-factor", _OFF, "interpolated rotary embeddings"),
    ("use_rope_scaling", "--use-rope-scaling", _OFF, "scaled rotary embeddings"),
    ("no_rope_freq", "--no-rope-freq", _UNSET, "layers without rotary embeddings"),
    ("quick_geglu", "--quick-geglu", _OFF, "quick GEGLU"),
    ("glu_linear_offset", "--glu-linear-offset", (None, 0.0), "an offset in the gated MLP"),
    ("activation_func_clamp_value", "--activation-func-clamp-value", _UNSET, "clamped activations"),
    ("qk_l2_norm", "--qk-l2-norm", _OFF, "L2 norms of queries and keys"),
    ("qk_clip", "--qk-clip", _OFF, "clipped attention logits"),
    ("softmax_type", "--softmax-type", (None, "vanilla"), "another softmax in the attention"),
    ("window_size", "--window-size", _UNSET, "windowed attention"),
    ("attention_output_gate", "--attention-output-gate", _OFF, "gated attention outputs"),
    ("experimental_attention_variant", "--experimental-attention-variant", _UNSET, "another attention"),
    ("mtp_num_layers", "--mtp-num-layers", (None, 0), "multi-token prediction"),
    ("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path", _UNSET, "layers that differ from each other"),
    ("is_hybrid_model", "--is-hybrid-model", _OFF, "hybrid layers"),
    ("hybrid_override_pattern", "--hybrid-override-pattern", _UNSET, "hybrid layers"),
    ("decoupled_lr", "--decoupled-lr", _UNSET, "another learning rate for the embeddings"),
    ("no_weight_decay_cond_type", "--no-weight-decay-cond-type", _UNSET, "other weight-decay groups"),
    ("apply_wd_to_qk_layernorm", "--apply-wd-to-qk-layernorm", _OFF, "other weight-decay groups"),
    ("use_mup", "--use-mup", _OFF, "embeddings and logits scaled by muP"),
    ("enable_mhc_connections", "--enable-mhc-connections", _OFF, "hyper-connections in place of residuals"),
    ("context_parallel_size", "--context-parallel-size", _ONE, "context parallelism"),
)


def settings_of_megatron_deepspeed(args: Any, rotary_angles: Literal["positions", "cosines"] = "cosines") -> Sections:
    """Sections ``model``, ``data``, ``training``, ``optimizer``, ``parallel`` and ``checkpoint`` of a Megatron-DeepSpeed run.

    ``data`` holds what documents of a sequence change and nothing else. fp16 runs are measured in float32, which is closer to
    fp16 than bfloat16 is.

    Args:
        args: its arguments after ``validate_args`` and after it has read the DeepSpeed config: a Namespace or a mapping.
        rotary_angles: what the checkout rotates queries and keys by (``model.rotary_angles``). From its commit 676a482c on, where
            ``RotaryEmbedding`` returns a list of cosines and sines, the attention takes the cosines for the angles.

    Raises:
        UserError: naming the flag and value of what the server's GPT does not have.
    """
    args = _Arguments(args)
    _refuse(args, (*_COMMON_RULES, *_MEGATRON_DEEPSPEED_RULES))
    rotary, heads = bool(args.get("use_rotary_position_embeddings")), args["num_attention_heads"]
    if args.get("num_key_value_heads") not in (None, heads):
        # Its attention cuts the projection into thirds, which are queries, keys and values only where they are equally many.
        raise _refusal("--num-key-value-heads", args["num_key_value_heads"], "grouped-query attention as this checkout lays it out")
    if not rotary and not args.get("add_position_embedding", True):
        raise _refusal("--no-position-embedding", True, "a model without positions")
    if not rotary and args.get("sequence_parallel"):
        raise _refusal("--sequence-parallel", True, "learned positions that tensor-parallel ranks share")
    if not args.get("no_pipeline_parallel"):
        raise UserError("without --no-pipeline-parallel DeepSpeed's pipeline engine trains, whose checkpoints are not read; add that flag")
    deepspeed = args.get("deepspeed_config_dict")
    if not isinstance(deepspeed, Mapping):
        raise UserError(
            "the arguments hold no deepspeed_config_dict: Group-MATES needs --deepspeed with --deepspeed_config, and the arguments as "
            "they are once training has read it"
        )
    sections = _common_settings(args, rotary, flash=_uses_flash_attention(args))
    sections["model"] |= {
        "activation": _megatron_deepspeed_activation(args),
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[args.get("normalization", "layernorm")],
        "qk_layernorm": False,
        "rotary_base": args.get("rope_theta", 10000),
        "rotary_angles": rotary_angles if rotary else "positions",
        "transformer_engine": "off",  # which would give the norms other names
    }
    # DeepSpeed clips by its own config; --clip-grad reaches nothing.
    sections["training"]["gradient_clipping"] = float(deepspeed.get("gradient_clipping", 0.0))
    sections["optimizer"]["zero_stage"] = int(deepspeed.get("zero_optimization", {}).get("stage", 0))
    if args.get("zero_stage") == 3:
        # It leaves one-dimensional parameters undecayed, and under ZeRO-3 a rank's part of every parameter has one dimension.
        sections["optimizer"]["weight_decay"] = 0.0
    if deepspeed.get("bf16", {}).get("enabled"):
        sections["training"]["precision"] = "bf16"
    sections["checkpoint"]["format"] = "megatron_deepspeed"
    return sections


def settings_of_megatron_lm(args: Any) -> Sections:
    """As :func:`settings_of_megatron_deepspeed`, of a Megatron-LM run on megatron-core layers.

    Args:
        args: its arguments after ``validate_args``: a Namespace or a mapping.

    Raises:
        UserError: naming the flag and value of what the server's GPT does not have.
    """
    args = _Arguments(args)
    _refuse(args, (*_COMMON_RULES, *_MEGATRON_LM_RULES))
    if args.get("add_qkv_bias") and not args.get("add_bias_linear", True):  # with --add-bias-linear the checkout sets it itself
        raise _refusal("--add-qkv-bias", True, "biases of queries, keys and values alone")
    positions = args.get("position_embedding_type", "learned_absolute")
    if positions not in ("rope", "learned_absolute"):
        raise _refusal("--position-embedding-type", positions, "such positions")
    sections = _common_settings(args, positions == "rope", flash=False)
    if args.get("swiglu"):
        activation = "swiglu"
    else:
        activation = "gelu_tanh" if args.get("bias_gelu_fusion") and args.get("add_bias_linear", True) else "gelu"
    sections["model"] |= {
        "activation": activation,
        "normalization": args.get("normalization", "LayerNorm"),
        "qk_layernorm": bool(args.get("qk_layernorm")),
        "rotary_base": args.get("rotary_base", 10000),
        "num_query_groups": args["num_query_groups"] if args.get("group_query_attention") else None,
    }
    sections["training"]["gradient_clipping"] = float(args.get("clip_grad", 1.0))
    sections["optimizer"]["zero_stage"] = 1 if args.get("use_distributed_optimizer") else 0
    sections["checkpoint"]["format"] = "megatron_lm"
    return sections


def left_out_of_oracles(args: Any) -> list[str]:
    """One line for each thing that the trainer does and oracles, which are the same at every run, leave out."""
    args = _Arguments(args)
    lines = []
    for name in ("hidden_dropout", "attention_dropout"):
        if args.get(name):
            lines.append(f"--{name.replace('_', '-')} {args[name]}: oracles are measured without dropout")
    if args.get("fp16"):
        lines.append("--fp16: oracles are measured in float32")
    return lines


class _Arguments:
    """A Namespace or a mapping, read alike; attributes that other versions of a checkout lack have defaults."""

    def __init__(self, args: Any) -> None:
        self._values: Mapping[str, Any] = args if isinstance(args, Mapping) else vars(args)

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        if self._values.get(name) is None:
            raise UserError(f"the arguments hold no {name}: Group-MATES needs them as they are after the checkout has checked them")
        return self._values[name]


def _refuse(args: _Arguments, rules: Iterable[_Rule]) -> None:
    for name, flag, neutral, what in rules:
        if (value := args.get(name)) not in neutral:
            raise _refusal(flag, value, what)


def _refusal(flag: str, value: Any, what: str) -> UserError:
    return UserError(
        f"{flag}: {value!r} means {what}, which the selection server's GPT does not have: it would measure the losses of another model; "
        "train without it"
    )


def _megatron_deepspeed_activation(args: _Arguments) -> str:
    # The order in which the checkout looks.
    if args.get("openai_gelu"):
        return "gelu_tanh"
    if args.get("swiglu"):
        return "swiglu"
    return "gelu_tanh" if args.get("bias_gelu_fusion") and args.get("add_bias_linear", True) else "gelu"


def _uses_flash_attention(args: _Arguments) -> bool:
    kinds = ("use_flash_attn", "use_flash_attn_v1", "use_flash_attn_v2", "use_flash_attn_triton", "use_flash_attn_builder")
    return any(args.get(kind) for kind in kinds)


def _common_settings(args: _Arguments, rotary: bool, flash: bool) -> Sections:
    """What the checkouts have in common. ``flash``: their attention takes no mask."""
    hidden, heads, sequence = args["hidden_size"], args["num_attention_heads"], args["seq_length"]
    if args.get("kv_channels", hidden // heads) * heads != hidden:
        raise _refusal("--kv-channels", args["kv_channels"], f"heads of another size than hidden size / heads ({hidden} / {heads})")
    model = {
        "num_layers": args["num_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": None,
        "ffn_hidden_size": args["ffn_hidden_size"],
        "add_bias_linear": bool(args.get("add_bias_linear", True)),
        "position_embedding_type": "rope" if rotary else "learned_absolute",
        "rotary_percent": float(args.get("rotary_percent", 1.0)),
        "max_position_embeddings": None if rotary else args["max_position_embeddings"],
        "untie_embeddings_and_output_weights": bool(args.get("untie_embeddings_and_output_weights")),
        "sequence_length": sequence,
        "vocab_size": args["padded_vocab_size"],
        "norm_epsilon": float(args.get("layernorm_epsilon", args.get("norm_epsilon", 1e-5))),
        "init_std": float(args.get("init_method_std", 0.02)),
        "z_loss": 0.0,
    }
    data = {
        "reset_attention_mask": bool(args.get("reset_attention_mask")) and not flash,
        # Their rotary angles go by the place in the sequence whatever the position ids are.
        "reset_position_ids": bool(args.get("reset_position_ids")) and not rotary,
        "eod_mask_loss": bool(args.get("eod_mask_loss")),
    }
    batch = args["global_batch_size"]
    training = {
        "train_iters": args.get("train_iters") or max(1, args["train_samples"] // batch),
        "global_batch_size": batch,
        "micro_batch_size": args["micro_batch_size"],
        "precision": "bf16" if args.get("bf16") else "fp32",
    }
    parallel = {"tensor_model_parallel_size": args.get("tensor_model_parallel_size", 1)}
    optimizer = _schedule(args, training["train_iters"]) | {
        "weight_decay": float(args.get("weight_decay", 0.01)),
        "beta1": float(args.get("adam_beta1", 0.9)),
        "beta2": float(args.get("adam_beta2", 0.999)),
        "epsilon": float(args.get("adam_eps", 1e-8)),
    }
    return {
        "model": model,
        "data": data,
        "training": training,
        "optimizer": optimizer,
        "parallel": parallel,
        "checkpoint": {"directory": args.get("save")},
    }


def _schedule(args: _Arguments, train_iters: int) -> dict[str, Any]:
    """The learning rate, as plans and reports show it; the oracle takes its own from the checkpoint, whatever the schedule."""
    batch = args["global_batch_size"]
    decay = args.get("lr_decay_iters") or args.get("lr_decay_samples", 0) // batch or train_iters
    warmup = args.get("lr_warmup_iters") or args.get("lr_warmup_samples", 0) // batch
    if args.get("lr_warmup_fraction"):
        warmup = int(args["lr_warmup_fraction"] * decay)
    style = args.get("lr_decay_style", "linear")
    peak = float(args["lr"])
    settings = {
        "learning_rate": peak,
        "min_learning_rate": min(peak, float(args.get("min_lr", 0.0))),
        "schedule": {"cosine": "cosine", "linear": "wsd", "constant": "constant"}.get(style, "constant"),
        "warmup_iters": warmup,
        "decay_iters": decay,
    }
    if settings["schedule"] == "wsd":
        settings["decay_fraction"] = (decay - settings["warmup_iters"]) / decay  # linear from the end of the warm-up on
    return settings
