"""Parameters, FLOPs and memory of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_groupmates.config import Config, ffn_hidden_size


@dataclass(frozen=True)
class ModelSize:
    """Counts for one model.

    Attributes:
        parameters: all weights.
        matrix_parameters: weights that take part in a matrix product per token (all but the input embedding and norms).
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
    per_layer_norms = 2 * h + 2 * head
    matrices = layers * (attention + 3 * h * f) + v * h
    parameters = matrices + v * h + layers * per_layer_norms + h
    # Causal: position i attends to i + 1 positions; scores and values each cost 2 * h FLOPs per pair.
    attention_flops = layers * 4 * h * (shape.sequence_length + 1) // 2
    return ModelSize(parameters=parameters, matrix_parameters=matrices, attention_flops_per_token=attention_flops)


def training_bytes_per_gpu(config: Config, data_parallel_size: int, bytes_per_parameter: int = 2) -> dict[str, int]:
    """Estimated bytes on each GPU by part: weights, gradients, ZeRO-partitioned optimizer state, activations.

    Mixed precision: low-precision weights and gradients, float32 master weights and two moments. Activations are the
    usual 34 * s * b * h bytes per layer without recomputation (Korthikanti et al., arXiv 2205.05198, without the score
    matrix, which SDPA does not keep) plus float32 logits.
    """
    shape, tensor, stage = config.model, config.parallel.tensor_model_parallel_size, config.optimizer.zero_stage
    share = model_size(config).parameters // tensor
    tokens = shape.sequence_length * config.training.micro_batch_size
    return {
        "weights": share * bytes_per_parameter // (data_parallel_size if stage >= 3 else 1),
        "gradients": share * bytes_per_parameter // (data_parallel_size if stage >= 2 else 1),
        "optimizer": share * 12 // (data_parallel_size if stage >= 1 else 1),
        "activations": tokens * shape.hidden_size * 34 * shape.num_layers // tensor + tokens * shape.vocab_size * 8 // tensor,
    }
