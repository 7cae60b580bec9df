"""Activation checkpointing: layers, or their attention, whose activations are computed again in the backward pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils.checkpoint import checkpoint


class RecomputedInBackward:
    """Mixed into a module: its forward pass keeps its inputs alone where gradients are wanted.

    torch's checkpointing rather than megatron-core's, which needs the random number generator of a GPU: nothing here is
    random, so there is no such state to keep.
    """

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As of the module's own class."""
        if not torch.is_grad_enabled():
            return super().forward(*arguments, **options)  # type: ignore[misc]
        return checkpoint(super().forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)  # type: ignore[misc]


def recompute(layer: ModuleSpec, granularity: Literal["none", "selective", "full"]) -> None:
    """Change the spec of a transformer layer so that its activations are recomputed.

    Args:
        layer: from megatron-core; its core attention a class.
        granularity: ``training.recompute_granularity``: nothing, the core attention, or the whole layer.
    """
    if granularity == "full":
        layer.module = _recomputed(layer.module)
    elif granularity == "selective":
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = _recomputed(attention.core_attention)


def _recomputed(module: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(f"Recomputed{module.__name__}", (RecomputedInBackward, module), {})
