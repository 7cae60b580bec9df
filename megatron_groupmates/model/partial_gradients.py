"""Tensor-parallel ranks that each see a part of what a weight of theirs is used for: the parts of its gradient are summed.

megatron-core leaves that to its own data-parallel wrapper; under DeepSpeed it is done here, as the gradients come.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceShardNorm:
    """torch's norm for activations that hold a rank's part of the sequence; takes megatron-core's arguments of a norm.

    megatron-core's own wrapper of torch's norms refuses sequence parallelism, because nobody sums their gradients there.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> torch.nn.Module:  # type: ignore[misc]
        """``torch.nn.RMSNorm`` or ``torch.nn.LayerNorm``, as the config says."""
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        return kind(hidden_size, eps=eps)


def sum_partial_gradients(model: torch.nn.Module, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """Sum over the tensor-parallel ``group``, in each backward pass, the gradients of weights that every rank holds whole.

    The norms of queries and keys are shared by all heads, of which a rank has some. Under sequence parallelism a rank has
    a part of the tokens wherever activations are not divided by heads or channels, which are all places where such
    weights are used, but for the table of positions: that is added before the sequence is divided.
    """
    if dist.get_world_size(group) == 1:
        return

    def total(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in model.named_parameters():
        by_heads = "q_layernorm" in name or "k_layernorm" in name
        by_tokens = sequence_parallel and not getattr(parameter, "tensor_model_parallel", False) and "position_embeddings" not in name
        if by_heads or by_tokens:
            parameter.register_hook(total)
