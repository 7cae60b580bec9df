"""The reference set D_ref: held-out examples whose loss the selection minimises."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_groupmates.model.losses import next_token_batch
from megatron_groupmates.pool.dataset import PoolDataset
from megatron_groupmates.pool.index import PoolIndex


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
        return int((self.labels >= 0).sum())

    def batches(self, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) in batches of at most ``batch_size`` examples."""
        return list(zip(self.tokens.split(batch_size), self.labels.split(batch_size), strict=True))


def load_reference(pool: PoolIndex, sequence_length: int, num_samples: int, device: torch.device) -> ReferenceSet:
    """The first ``num_samples`` samples of a held-out pool (fewer if it has fewer), every token scored."""
    dataset = PoolDataset(pool, sequence_length)
    samples = torch.stack([dataset[row] for row in range(min(num_samples, pool.num_samples))])
    tokens, labels = next_token_batch(samples.to(device))
    return ReferenceSet(tokens=tokens, labels=labels)
