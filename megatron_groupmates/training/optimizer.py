"""Parameter groups and the AdamW that DeepSpeed wraps."""

from __future__ import annotations

import torch

from megatron_groupmates.config import Config, learning_rate


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Weight decay applies to matrices and embeddings, not to norms or other vectors."""
    return parameter.ndim > 1


def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with two groups, decayed and not, at the learning rate of step 1."""
    settings = config.optimizer
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate(config, 1), betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use ``value`` for the next step in every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
