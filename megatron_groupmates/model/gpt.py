"""Build the GPT of a run from megatron-core, with the activation, norms, positions and biases that its config names."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_groupmates.config import Config, ffn_hidden_size, has_gated_mlp, num_positions
from megatron_groupmates.model.attention import AttendsWithinSegments, SDPACoreAttention
from megatron_groupmates.model.batch import PackedBatch
from megatron_groupmates.model.partial_gradients import SequenceShardNorm, sum_partial_gradients
from megatron_groupmates.model.recomputation import recompute
from megatron_groupmates.parallel import ParallelGroups

logger = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


def build_gpt(
    config: Config, groups: ParallelGroups, tensor_model_parallel_size: int, dtype: torch.dtype, *, for_training: bool = False
) -> GPTModel:
    """The run's model on this rank's device, with initial weights that do not depend on the tensor-parallel size.

    Weights are drawn on the CPU, whole, from ``run.seed``, and each rank keeps its slice. Every rank must call.

    Args:
        config: the run.
        groups: this rank's groups; its tensor-parallel size must equal ``tensor_model_parallel_size``.
        tensor_model_parallel_size: ranks per model: the trainer's or the server's.
        dtype: parameters and activations (float32 or bfloat16).
        for_training: obey ``parallel.sequence_parallel`` and ``training.recompute_granularity``, which change what a training
            step holds in memory, not what it computes. The length of its sequences must then divide over the ranks, and
            packed batches are not for it.
    """
    sequence_parallel = for_training and config.parallel.sequence_parallel and tensor_model_parallel_size > 1
    recompute_granularity = config.training.recompute_granularity if for_training else "none"
    assert groups.tensor_size == tensor_model_parallel_size
    torch.manual_seed(config.run.seed)
    model = GPTModel(
        config=_transformer_config(config, tensor_model_parallel_size, dtype, sequence_parallel),
        transformer_layer_spec=_block_spec(config, groups.device, sequence_parallel, recompute_granularity),
        vocab_size=config.model.vocab_size,
        max_sequence_length=num_positions(config),
        parallel_output=True,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type=config.model.position_embedding_type,
        rotary_percent=config.model.rotary_percent,
        rotary_base=config.model.rotary_base,
    )
    model = model.to(device=groups.device, dtype=dtype)
    if config.model.position_embedding_type == "rope":
        _follow_position_ids(model, always=config.data.reset_position_ids, cosines=config.model.rotary_angles == "cosines")
    sum_partial_gradients(model, groups.tensor_group, sequence_parallel)
    return model


def token_logits(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of this rank's slice of the vocabulary: int64 ``[b, s]`` -> ``[b, s, vocab / tensor_size]``.

    Collective over the tensor-parallel group.

    Args:
        model: the GPT or its engine.
        tokens: inputs.
        attention_mask: bool ``[b, 1, s, s]``, True where hidden; causal when None.
        position_ids: int64 ``[b, s]``; followed where the model was built with ``data.reset_position_ids``.
    """
    if position_ids is None:
        position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, position_ids, attention_mask)


@torch.no_grad()
def hidden_states(
    model: GPTModel,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final hidden states after the last norm, the same on every tensor-parallel rank: int64 ``[b, s]`` -> ``[s, b, h]``.

    Collective over the tensor-parallel group. Arguments as of :func:`token_logits`.
    """
    with _without_output_layer(model):
        return token_logits(model, tokens, attention_mask, position_ids)


@torch.no_grad()
def packed_hidden_states(model: GPTModel, batch: PackedBatch) -> torch.Tensor:
    """As :func:`hidden_states`, of a packed batch: ``[t, h]``. Collective over the tensor-parallel group."""
    return _packed_hidden(model, batch).squeeze(1)


@torch.no_grad()
def token_embeddings(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Word embeddings ``[s, b, h]`` of ``tokens`` int64 ``[b, s]``, the same on every rank. Collective over the tensor-parallel group."""
    return model.embedding.word_embeddings(tokens).transpose(0, 1).contiguous()


def packed_logits(model: GPTModel, batch: PackedBatch, num_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits where a packed batch is scored, in parts of at most ``num_tokens`` tokens: the output layer sees nothing else.

    Collective over the tensor-parallel group.

    Yields:
        (logits ``[1, n, vocab / tensor_size]``, labels int64 ``[1, n]``).
    """
    chosen = _packed_hidden(model, batch)[batch.scored]
    tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    for part, labels in zip(chosen.split(num_tokens), batch.labels.split(num_tokens), strict=True):
        logits, _ = model.output_layer(part, weight=tied)
        yield logits.transpose(0, 1), labels.unsqueeze(0)


def _packed_hidden(model: GPTModel, batch: PackedBatch) -> torch.Tensor:
    with _without_output_layer(model):
        return model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.segments)


@contextlib.contextmanager
def _without_output_layer(model: GPTModel) -> Iterator[None]:
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = True


def _transformer_config(config: Config, tensor_model_parallel_size: int, dtype: torch.dtype, sequence_parallel: bool) -> TransformerConfig:
    shape = config.model

    def draw(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(weight, mean=0.0, std=shape.init_std)

    def draw_residual(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(weight, mean=0.0, std=shape.init_std / (2 * shape.num_layers) ** 0.5)

    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=ffn_hidden_size(config),
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups or shape.num_attention_heads,
        tensor_model_parallel_size=tensor_model_parallel_size,
        sequence_parallel=sequence_parallel,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=shape.qk_layernorm,
        add_bias_linear=shape.add_bias_linear,
        gated_linear_unit=has_gated_mlp(config),
        activation_func=_ACTIVATIONS[shape.activation],
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=draw,
        output_layer_init_method=draw_residual,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
    )


def _block_spec(
    config: Config, device: torch.device, sequence_parallel: bool, recompute_granularity: Literal["none", "selective", "full"]
) -> ModuleSpec | TransformerBlockSubmodules:
    layer = _layer_spec(config, device)
    recompute(layer, recompute_granularity)
    if not sequence_parallel or layer.submodules.input_layernorm is IdentityOp:
        return layer  # Transformer Engine's norms, fused with what follows them, may hold a part of the sequence
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceShardNorm
    attention = layer.submodules.self_attention.submodules
    if config.model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceShardNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.model.num_layers, layer_norm=SequenceShardNorm)


def _layer_spec(config: Config, device: torch.device) -> ModuleSpec:
    if config.model.transformer_engine == "auto" and device.type == "cuda" and importlib.util.find_spec("transformer_engine"):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.model.qk_layernorm)
        if config.data.reset_attention_mask:
            # Transformer Engine's fast kernels take no mask of our own.
            spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
            logger.info("layers: Transformer Engine, with torch's attention for data.reset_attention_mask")
        else:
            logger.info("layers: Transformer Engine")
            attention = spec.submodules.self_attention.submodules
            attention.core_attention = type("PackingCoreAttention", (AttendsWithinSegments, attention.core_attention), {})
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=config.model.qk_layernorm, normalization=config.model.normalization)
    spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return spec


class _DocumentRotary(torch.nn.Module):
    """Rotary angles at the position ids of the batch in hand; without any, megatron-core's, at positions from 0 on.

    With ``cosines`` their cosines take the place of the angles (``model.rotary_angles``).
    """

    def __init__(self, rotary: torch.nn.Module, cosines: bool) -> None:
        super().__init__()
        self._rotary = rotary
        self._cosines = cosines
        self.get_rotary_seq_len = rotary.get_rotary_seq_len
        self.position_ids: torch.Tensor | None = None

    def forward(self, max_seq_len: int, **options: Any) -> torch.Tensor:
        """Angles float32 ``[s, b, 1, d]`` of the positions in ``position_ids``, all below ``max_seq_len``; ``[s, 1, 1, d]`` without."""
        angles = self._rotary(max_seq_len, **options)
        if self._cosines:
            angles = angles.cos()
        if self.position_ids is None:
            return angles
        return angles[:, 0, 0][self.position_ids.transpose(0, 1)].unsqueeze(2)


def _follow_position_ids(model: GPTModel, always: bool, cosines: bool) -> None:
    """Rotary angles by the position ids of packed batches, and if ``always`` of every batch."""
    rotary = model.rotary_pos_emb = _DocumentRotary(model.rotary_pos_emb, cosines)

    def note(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        rotary.position_ids = arguments[1] if always or "packed_seq_params" in options else None

    model.register_forward_pre_hook(note, with_kwargs=True)
