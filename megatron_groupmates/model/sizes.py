"""Parameters, FLOPs and memory of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_groupmates.config import Config, ffn_hidden_size, has_gated_mlp, num_positions

# DeepSpeed's default of stage3_max_live_parameters: weights that ZeRO-3 holds gathered at a time, at most.
_ZERO_3_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class ModelSize:
    """Counts for one model.

    Attributes:
        parameters: all weights.
        matrix_parameters: weights that take part in a matrix product per token (all but the input embedding, unless it is the
            output layer too, positions, biases and norms).
        attention_flops_per_token: forward FLOPs per token of the score and value products, averaged over a causal sequence.
    """

    parameters: int
    matrix_parameters: int
    attention_flops_per_token: int

    @property
    def forward_flops_per_token(self) -> int:
        """Two FLOPs per multiply-add."""
        return 2 * self.matrix_parameters + self.attention_flops_per_token

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward: three times the forward pass."""
        return 3 * self.forward_flops_per_token


def model_size(config: Config) -> ModelSize:
    """Exact parameter count and per-token FLOPs of the model of ``config``."""
    shape = config.model
    h, layers, f, v = shape.hidden_size, shape.num_layers, ffn_hidden_size(config), shape.vocab_size
    head = h // shape.num_attention_heads
    groups = shape.num_query_groups or shape.num_attention_heads
    attention = h * (h + 2 * groups * head) + h * h
    mlp_width = 2 * f if has_gated_mlp(config) else f
    per_norm = 2 if shape.normalization == "LayerNorm" else 1
    vectors = layers * (2 * h + (2 * head if shape.qk_layernorm else 0)) * per_norm + h * per_norm
    if shape.add_bias_linear:
        vectors += layers * ((h + 2 * groups * head) + h + mlp_width + h)
    matrices = layers * (attention + h * mlp_width + f * h) + v * h
    embeddings = v * h if shape.untie_embeddings_and_output_weights else 0
    if shape.position_embedding_type == "learned_absolute":
        embeddings += num_positions(config) * h
    parameters = matrices + embeddings + vectors
    # Causal: position i attends to i + 1 positions; scores and values each cost 2 * h FLOPs per pair.
    attention_flops = layers * 4 * h * (shape.sequence_length + 1) // 2
    return ModelSize(parameters=parameters, matrix_parameters=matrices, attention_flops_per_token=attention_flops)


def recomputed_flops_per_token(config: Config) -> int:
    """FLOPs of a training step that ``training.recompute_granularity`` adds: a second forward pass of attention or of all layers."""
    size = model_size(config)
    return {
        "none": 0,
        "selective": size.attention_flops_per_token,
        "full": size.forward_flops_per_token - 2 * config.model.vocab_size * config.model.hidden_size,
    }[config.training.recompute_granularity]


def training_bytes_per_gpu(config: Config, data_parallel_size: int, bytes_per_parameter: int = 2) -> dict[str, int]:
    """Estimated bytes on each GPU by part: weights, gradients, ZeRO-partitioned optimizer state, activations.

    Mixed precision: low-precision weights and gradients, float32 master weights and two moments. ZeRO-3 adds the weights it
    has gathered at a time. Not counted: DeepSpeed's buckets, and that every rank builds its whole slice of the model first.
    """
    shape, tensor, stage = config.model, config.parallel.tensor_model_parallel_size, config.optimizer.zero_stage
    share = model_size(config).parameters // tensor
    tokens = shape.sequence_length * config.training.micro_batch_size
    parts = {
        "weights": share * bytes_per_parameter // (data_parallel_size if stage >= 3 else 1),
        "gradients": share * bytes_per_parameter // (data_parallel_size if stage >= 2 else 1),
        "optimizer": share * 12 // (data_parallel_size if stage >= 1 else 1),
        "activations": int(tokens * shape.hidden_size * _activation_bytes(config)) + tokens * shape.vocab_size * 8 // tensor,
    }
    if stage == 3:
        parts["gathered"] = min(share, _ZERO_3_LIVE_PARAMETERS) * bytes_per_parameter
    return parts


def _activation_bytes(config: Config) -> float:
    """Bytes of activations kept for the backward pass, per token and hidden channel, of all layers.

    The usual counts (Korthikanti et al., arXiv 2205.05198): of 34 bytes in a layer tensor parallelism divides 24, with sequence
    parallelism all. They leave out the score matrix, which fused attention does not keep: recomputing attention alone saves
    nothing of them. Recomputing whole layers keeps the 2 bytes of each layer's input, and one layer at a time as it was.
    """
    tensor, layers = config.parallel.tensor_model_parallel_size, config.model.num_layers
    outside = tensor if config.parallel.sequence_parallel else 1
    layer = 10 / outside + 24 / tensor
    if config.training.recompute_granularity == "full":
        return layers * 2 / outside + layer
    return layers * layer
