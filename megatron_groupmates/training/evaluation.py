"""The evaluation loss: one token-weighted mean over all held-out tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_groupmates.model.gpt import token_logits
from megatron_groupmates.model.losses import next_token_batch, token_losses
from megatron_groupmates.parallel import ParallelGroups


@torch.no_grad()
def evaluation_loss(model: torch.nn.Module, batches: Iterable[torch.Tensor], groups: ParallelGroups) -> float:
    """Cross-entropy per token over all data-parallel ranks; does not depend on the batch size beyond rounding.

    Collective: every rank must call.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=groups.device)
    for samples in batches:
        tokens, labels = next_token_batch(samples)
        losses = token_losses(token_logits(model, tokens), labels, groups.tensor_group)
        totals += torch.stack((losses.cross_entropy, losses.num_tokens)).double()
    dist.all_reduce(totals, group=groups.data_group)
    return (totals[0] / totals[1]).item()
