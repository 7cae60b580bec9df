"""The evaluation loss: one token-weighted mean over all scored held-out tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_groupmates.model.batch import DocumentRules, document_inputs
from megatron_groupmates.model.gpt import token_logits
from megatron_groupmates.model.losses import token_losses
from megatron_groupmates.parallel import ParallelGroups


@torch.no_grad()
def evaluation_loss(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], groups: ParallelGroups, rules: DocumentRules
) -> float:
    """Cross-entropy per scored token over all data-parallel ranks; does not depend on the batch size beyond rounding.

    Collective: every rank must call, with as many batches as the others.

    Args:
        model: the GPT or its engine.
        batches: (tokens, labels) int64 ``[b, s]`` of this rank, labels -100 where a token is not scored.
        groups: this rank's groups.
        rules: of the run: what the documents of a sequence change, but for which tokens are scored.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=groups.device)
    for tokens, labels in batches:
        losses = token_losses(token_logits(model, tokens, *document_inputs(tokens, rules)), labels, groups.tensor_group)
        totals += torch.stack((losses.cross_entropy, losses.num_tokens)).double()
    dist.all_reduce(totals, group=groups.data_group)
    return (totals[0] / totals[1]).item()
