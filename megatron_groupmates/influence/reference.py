"""The reference set D_ref: held-out examples whose loss the selection minimises."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_groupmates.model.losses import IGNORED_LABEL
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.references.examples import HeldOutExamples


@dataclass(frozen=True)
class ReferenceSet:
    """Examples with their labels.

    Attributes:
        tokens: int64 ``[n, s]``.
        labels: int64 ``[n, s]``, -100 where a token is not scored.
    """

    tokens: torch.Tensor
    labels: torch.Tensor

    @property
    def num_scored_tokens(self) -> int:
        """Tokens that enter the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

    def batches(self, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) in batches of at most ``batch_size`` examples.

        Longest examples first, each batch cut after its last scored token: with causal attention nothing behind it matters.
        Examples of equal lengths keep their order.
        """
        scored = self.labels != IGNORED_LABEL
        lengths = (scored * torch.arange(1, scored.shape[1] + 1, device=scored.device)).amax(1).clamp(min=1)
        order = lengths.argsort(descending=True, stable=True)
        return [(self.tokens[rows, : lengths[rows[0]]], self.labels[rows, : lengths[rows[0]]]) for rows in order.split(batch_size)]


def load_reference(pool: PoolIndex, sequence_length: int, num_samples: int, device: torch.device) -> ReferenceSet:
    """The first ``num_samples`` examples of a held-out pool or reference set (fewer if it has fewer).

    Raises:
        UserError: an example does not fit the model.
    """
    rows = range(min(num_samples, pool.num_samples))
    tokens, labels = HeldOutExamples(pool, sequence_length).batch(rows, IGNORED_LABEL)
    return ReferenceSet(tokens=torch.from_numpy(tokens).to(device), labels=torch.from_numpy(labels).to(device))
