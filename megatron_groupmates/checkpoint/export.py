"""Our GPT as Hugging Face's Qwen3: which tensor comes from where. Pure functions; nothing is read or written.

Qwen3 is the stock architecture with everything our model has and nothing else: SwiGLU, rotary embedding over the whole
head, RMS norms, RMS norms of each head's queries and keys, no biases, untied output. The export is therefore exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_groupmates.config import Config, ffn_hidden_size
from megatron_groupmates.config.errors import UserError

ARCHITECTURE, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"


@dataclasses.dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the export.

    Attributes:
        name: in the Hugging Face model.
        shape: of it.
        source: the parameter in the checkpoint that holds it.
        source_shape: of that parameter, whole.
        cut: takes this tensor out of the whole parameter; the result may be a view.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    source_shape: tuple[int, ...]
    cut: Callable[[torch.Tensor], torch.Tensor]


def check_architecture(config: Config) -> None:
    """Return when the run's model is one that the exported architecture computes.

    Raises:
        UserError: naming the first setting that it has no place for, and its value.
    """
    needed: dict[str, Any] = {
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_angles": "positions",
        "untie_embeddings_and_output_weights": True,
    }
    for name, value in needed.items():
        if (own := getattr(config.model, name)) != value:
            raise UserError(f"model.{name}: {own}: the export is to {ARCHITECTURE}, which computes a model with {value} alone")


def hugging_face_config(config: Config, vocab_size: int, dtype: torch.dtype, eot_id: int | None) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        config: the run.
        vocab_size: rows of the exported embedding.
        dtype: of the exported weights.
        eot_id: id that ends a document, None where it is not known.
    """
    shape = config.model
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": ffn_hidden_size(config),
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups or shape.num_attention_heads,
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_epsilon,
        "max_position_embeddings": shape.sequence_length,
        # transformers 4 reads the first, transformers 5 the second.
        "rope_theta": float(shape.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(shape.rotary_base)},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "initializer_range": shape.init_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eot_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def exported_tensors(config: Config, vocab_size: int, fused_norms: bool) -> list[ExportedTensor]:
    """Every tensor of the export, those of one parameter next to each other.

    Args:
        config: the run.
        vocab_size: rows of the embedding and output layer to export, the first ones; the others are padding.
        fused_norms: the checkpoint has Transformer Engine's names, where the norms before a linear layer are part of it.
    """
    shape = config.model
    assert 0 < vocab_size <= shape.vocab_size
    hidden, ffn = shape.hidden_size, ffn_hidden_size(config)
    head = hidden // shape.num_attention_heads
    groups = shape.num_query_groups or shape.num_attention_heads
    per_group = shape.num_attention_heads // groups

    def whole(name: str, source: str, *size: int) -> ExportedTensor:
        return ExportedTensor(name, size, source, size, lambda parameter: parameter)

    def vocabulary(name: str, source: str) -> ExportedTensor:
        return ExportedTensor(name, (vocab_size, hidden), source, (shape.vocab_size, hidden), lambda parameter: parameter[:vocab_size])

    def attention(name: str, source: str, part: int) -> ExportedTensor:
        rows = groups * head * (per_group if part == 0 else 1)
        fused = (groups * (per_group + 2) * head, hidden)
        return ExportedTensor(name, (rows, hidden), source, fused, lambda fused: split_qkv(fused, groups, per_group, head)[part])

    def gated(name: str, source: str, part: int) -> ExportedTensor:
        return ExportedTensor(name, (ffn, hidden), source, (2 * ffn, hidden), lambda fused: fused.chunk(2)[part])

    tensors = [vocabulary("model.embed_tokens.weight", "embedding.word_embeddings.weight")]
    for layer in range(shape.num_layers):
        to, at = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        qkv, fc1 = f"{at}self_attention.linear_qkv", f"{at}mlp.linear_fc1"
        tensors += [
            whole(f"{to}input_layernorm.weight", f"{qkv}.layer_norm_weight" if fused_norms else f"{at}input_layernorm.weight", hidden),
            *(attention(f"{to}self_attn.{part}_proj.weight", f"{qkv}.weight", number) for number, part in enumerate("qkv")),
            *(whole(f"{to}self_attn.{part}_norm.weight", f"{at}self_attention.{part}_layernorm.weight", head) for part in "qk"),
            whole(f"{to}self_attn.o_proj.weight", f"{at}self_attention.linear_proj.weight", hidden, hidden),
            whole(
                f"{to}post_attention_layernorm.weight",
                f"{fc1}.layer_norm_weight" if fused_norms else f"{at}pre_mlp_layernorm.weight",
                hidden,
            ),
            *(gated(f"{to}mlp.{part}_proj.weight", f"{fc1}.weight", number) for number, part in enumerate(("gate", "up"))),
            whole(f"{to}mlp.down_proj.weight", f"{at}mlp.linear_fc2.weight", hidden, ffn),
        ]
    return [
        *tensors,
        whole("model.norm.weight", "decoder.final_layernorm.weight", hidden),
        vocabulary("lm_head.weight", "output_layer.weight"),
    ]


def split_qkv(fused: torch.Tensor, groups: int, per_group: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of Megatron's fused projection, heads in the same order.

    Args:
        fused: ``[groups * (per_group + 2) * head, hidden]``: for each query group its queries, its key and its value.
        groups: query groups (key/value heads).
        per_group: attention heads of each.
        head: width of a head.

    Returns:
        ``[groups * per_group * head, hidden]`` and twice ``[groups * head, hidden]``.
    """
    parts = fused.view(groups, per_group + 2, head, -1).split((per_group, 1, 1), dim=1)
    query, key, value = (part.reshape(-1, fused.shape[1]) for part in parts)
    return query, key, value


def has_fused_norms(names: Sequence[str]) -> bool:
    """True for the parameter names of Transformer Engine's layers."""
    return any(name.endswith(".layer_norm_weight") for name in names)


def check_parameters(
    tensors: Sequence[ExportedTensor], names: Sequence[str], shape_of: Callable[[str], tuple[int, ...]], path: object
) -> None:
    """Refuse a checkpoint whose parameters are not those of the run's model.

    Args:
        tensors: of the export.
        names: parameters of the checkpoint.
        shape_of: the shape of one of them.
        path: of the checkpoint, for messages.

    Raises:
        UserError: naming the first parameter that is missing, surplus or of another shape.
    """
    expected = {tensor.source: tensor.source_shape for tensor in tensors}
    for name in [*expected, *names]:
        if name not in names:
            raise UserError(
                f"checkpoint {path} has no parameter '{name}', which the config's model has: it is of another model, or of one that "
                "Qwen3 is not; give the config of its run (--config)"
            )
        if name not in expected:
            raise UserError(
                f"checkpoint {path} has a parameter '{name}', which the config's model has not and Qwen3 has no place for; "
                "give the config of its run (--config)"
            )
        if tuple(shape_of(name)) != expected[name]:
            raise UserError(
                f"checkpoint {path}: parameter '{name}' has shape {tuple(shape_of(name))}, the config's model {expected[name]}; "
                "give the config of its run (--config)"
            )
