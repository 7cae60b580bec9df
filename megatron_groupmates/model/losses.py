"""Cross-entropy and z-loss over a vocabulary that is split over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

IGNORED_LABEL = -100


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token negative log-likelihood and log-partition of vocabulary-parallel logits, in float32."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        peak = logits.amax(-1)
        if size > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        shifted = logits - peak.unsqueeze(-1)
        local = targets - rank * logits.shape[-1]
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)
        target_logit = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack((exponentials.sum(-1), target_logit))
        if size > 1:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, outside)
        return log_sum - sums[1], log_sum + peak

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor, grad_log_partition: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        probabilities, local, outside = ctx.saved_tensors
        gradient = probabilities * (grad_nll + grad_log_partition).unsqueeze(-1)
        gradient.scatter_add_(-1, local.unsqueeze(-1), -grad_nll.masked_fill(outside, 0.0).unsqueeze(-1))
        return gradient, None, None, None, None


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the scored tokens of one batch (float32 scalars, equal on every tensor-parallel rank)."""

    cross_entropy: torch.Tensor
    squared_log_partition: torch.Tensor
    num_tokens: torch.Tensor

    def training_loss(self, z_loss: float) -> torch.Tensor:
        """Mean cross-entropy plus ``z_loss`` times the mean squared log-partition: what the optimizer sees; 0 without a scored token."""
        total = self.cross_entropy
        if z_loss:
            total = total + z_loss * self.squared_log_partition
        return total / self.num_tokens.clamp(min=1.0)


def token_losses(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> TokenLosses:
    """Loss sums of vocabulary-parallel ``logits`` ``[b, s, v / tensor_size]`` for ``labels`` int64 ``[b, s]`` (-100 = not scored).

    Collective over the tensor-parallel ``group``.
    """
    nll, log_partition, scored = _by_token(logits, labels, group)
    return TokenLosses(
        cross_entropy=(nll * scored).sum(),
        squared_log_partition=(log_partition.square() * scored).sum(),
        num_tokens=scored.sum().float(),
    )


def losses_by_token(logits: torch.Tensor, labels: torch.Tensor, z_loss: float, group: dist.ProcessGroup) -> torch.Tensor:
    """What each token adds to :meth:`TokenLosses.training_loss` before the mean: float64 ``[b, s]``, 0 where not scored.

    Arguments as of :func:`token_losses`. Collective over the tensor-parallel ``group``.
    """
    nll, log_partition, scored = _by_token(logits, labels, group)
    losses = nll.double()
    if z_loss:
        losses = losses + z_loss * log_partition.double().square()
    return losses * scored


def _by_token(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Negative log-likelihood and log-partition, float32 ``[b, s]``, and which tokens are scored, bool ``[b, s]``."""
    scored = labels != IGNORED_LABEL
    targets = labels.masked_fill(~scored, 0)
    nll, log_partition = _VocabParallelCrossEntropy.apply(logits, targets, group, dist.get_rank(group), dist.get_world_size(group))
    return nll, log_partition, scored


def next_token_batch(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split int64 ``[b, s + 1]`` samples into inputs ``[b, s]`` and the labels they predict ``[b, s]``."""
    return samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
