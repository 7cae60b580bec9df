"""The reference set D_ref: held-out examples whose loss the selection minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_groupmates.model.batch import DocumentRules, PackedBatch, pack
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

    def batches(self, num_tokens: int, rules: DocumentRules) -> list[PackedBatch]:
        """The examples packed into batches of at most ``num_tokens`` tokens, which an example by itself may exceed.

        Each example is cut after its last scored token, for with causal attention nothing behind it matters, and one without
        scored tokens is left out. Longest examples first, each into the first batch with room; equal lengths keep their order.
        """
        scored = self.labels != IGNORED_LABEL
        lengths = (scored * torch.arange(1, scored.shape[1] + 1, device=scored.device)).amax(1).tolist()
        order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
        examples = [(self.tokens[row, : lengths[row]], self.labels[row, : lengths[row]]) for row in order]
        bins = first_fit([lengths[row] for row in order], num_tokens)
        return [pack([examples[number] for number in numbers], rules) for numbers in bins]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of ``sizes`` by the bin each falls into: the first with room, in the order given; a size above capacity is alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for position, size in enumerate(sizes):
        number = next((number for number, left in enumerate(room) if size <= left), len(bins))
        if number == len(bins):
            bins.append([])
            room.append(capacity)
        bins[number].append(position)
        room[number] -= size
    return bins


def load_reference(pool: PoolIndex, sequence_length: int, num_samples: int, device: torch.device, first: int = 0) -> ReferenceSet:
    """``num_samples`` examples of a held-out pool or reference set from its example ``first`` on (fewer if it has fewer).

    Raises:
        UserError: an example does not fit the model.
    """
    rows = range(first, min(first + num_samples, pool.num_samples))
    tokens, labels = HeldOutExamples(pool, sequence_length).batch(rows, IGNORED_LABEL)
    return ReferenceSet(tokens=torch.from_numpy(tokens).to(device), labels=torch.from_numpy(labels).to(device))
