"""From samples to what the model reads and predicts: one function for the trainer and the probe.

Where a sequence holds several documents, each closed by the end-of-text token, three settings say what that changes. They
have Megatron's names and meanings: ``reset_attention_mask``, ``reset_position_ids`` and ``eod_mask_loss``. The end-of-text
token belongs to the document it closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_groupmates.config import Config
from megatron_groupmates.model.attention import Segments
from megatron_groupmates.model.losses import IGNORED_LABEL, next_token_batch

# int64 [n, s + 1], or n tensors int64[length] of any lengths up to that.
Samples = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class DocumentRules:
    """What the documents of a sequence change.

    Attributes:
        eot_id: token that closes a document.
        reset_attention_mask: tokens attend to their own document alone.
        reset_position_ids: positions begin at 0 in each document.
        eod_mask_loss: the first token of the next document is not scored.
    """

    eot_id: int
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @classmethod
    def of(cls, config: Config, eot_id: int) -> DocumentRules:
        """The rules of a run on a pool with this end-of-text token."""
        data = config.data
        return cls(eot_id, data.reset_attention_mask, data.reset_position_ids, data.eod_mask_loss)


@dataclass(frozen=True)
class Batch:
    """What one forward pass and its loss need.

    Attributes:
        tokens: int64 ``[b, s]``.
        labels: int64 ``[b, s]``, -100 where a token is not scored.
        attention_mask: bool ``[b, 1, s, s]``, True where hidden; None for plain causal attention.
        position_ids: int64 ``[b, s]``; None for positions from 0 on.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True)
class PackedBatch:
    """Samples of any lengths one behind the other, for one forward pass without padding.

    Attributes:
        tokens: int64 ``[1, t]``.
        position_ids: int64 ``[1, t]``.
        segments: what attends to what.
        scored: int64 ``[n]``, which of the t tokens predict a scored one.
        labels: int64 ``[n]``, what those predict.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    scored: torch.Tensor
    labels: torch.Tensor


def training_batch(samples: torch.Tensor, rules: DocumentRules, unscored: torch.Tensor | None = None) -> Batch:
    """The batch of int64 ``[b, s + 1]`` samples.

    Args:
        samples: token ids.
        rules: of the run.
        unscored: bool ``[b, s + 1]``, tokens that must carry no loss.
    """
    tokens, labels = next_token_batch(samples)
    if rules.eod_mask_loss:
        labels = labels.masked_fill(tokens == rules.eot_id, IGNORED_LABEL)
    if unscored is not None:
        labels = labels.masked_fill(unscored[:, 1:], IGNORED_LABEL)
    attention_mask, position_ids = document_inputs(tokens, rules)
    return Batch(tokens, labels, attention_mask, position_ids)


def document_inputs(tokens: torch.Tensor, rules: DocumentRules) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``attention_mask`` and ``position_ids`` of int64 ``[b, s]`` tokens, as in :class:`Batch`; None what the rules leave alone."""
    if not (rules.reset_attention_mask or rules.reset_position_ids):
        return None, None
    ends = tokens == rules.eot_id
    attention_mask, position_ids = None, None
    if rules.reset_attention_mask:
        document = ends.cumsum(1) - ends.long()
        size = tokens.shape[1]
        future = torch.ones(size, size, dtype=torch.bool, device=tokens.device).triu(1)
        attention_mask = ((document[:, :, None] != document[:, None, :]) | future).unsqueeze(1)
    if rules.reset_position_ids:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        begins = torch.zeros_like(tokens)
        begins[:, 1:] = torch.where(ends[:, :-1], position[1:], 0)
        position_ids = position - begins.cummax(1).values
    return attention_mask, position_ids


def pack(samples: Sequence[tuple[torch.Tensor, torch.Tensor]], rules: DocumentRules) -> PackedBatch:
    """Pack samples, each (tokens int64 ``[length]``, labels int64 ``[length]``, -100 where not scored), in their order.

    Each sample, and by the rules each of its documents, is to the model what it is by itself.
    """
    tokens, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
    lengths = [len(part) for part, _ in samples]
    documents = [length for part, _ in samples for length in _document_lengths(part == rules.eot_id)]
    positions = [torch.arange(length) for length in (documents if rules.reset_position_ids else lengths)]
    scored = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    return PackedBatch(
        tokens=tokens.unsqueeze(0),
        position_ids=torch.cat(positions).to(tokens.device).unsqueeze(0),
        segments=Segments.of(documents if rules.reset_attention_mask else lengths, max(lengths), tokens.device),
        scored=scored,
        labels=labels[scored],
    )


def pack_samples(samples: Samples, rules: DocumentRules) -> tuple[PackedBatch, list[int]]:
    """Pack samples to train on, each with the labels that :func:`training_batch` gives it; also how many are scored in each."""
    plain = DocumentRules(rules.eot_id, eod_mask_loss=rules.eod_mask_loss)
    batches = [training_batch(sample.unsqueeze(0), plain) for sample in samples]
    # Counted on the device and fetched once.
    num_scored = torch.stack([(batch.labels != IGNORED_LABEL).sum() for batch in batches]).tolist()
    return pack([(batch.tokens[0], batch.labels[0]) for batch in batches], rules), num_scored


def _document_lengths(ends: torch.Tensor) -> list[int]:
    """Lengths of the documents of one sample, of which ``ends`` bool ``[length]`` marks the last tokens; the rest is one more."""
    bounds = sorted({0, *(ends.nonzero().squeeze(1) + 1).tolist(), len(ends)})
    return [stop - start for start, stop in pairwise(bounds)]
