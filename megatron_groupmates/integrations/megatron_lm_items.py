"""What Megatron-LM's data loader collates, made from the tokens of a sample."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class SampleItem:
    """Tokens int64[s + 1] -> one item, as the GPT dataset of megatron-core makes it from its own samples.

    ``tokens`` and ``labels`` are int64[s], ``loss_mask`` float32[s], ``position_ids`` int64[s] and, where the loader is to
    make it, ``attention_mask`` bool[1, s, s], True where hidden. The token that ends a document belongs to it.

    Attributes:
        end_of_document: id of that token.
        reset_position_ids: positions begin at 0 again in each document.
        reset_attention_mask: tokens attend to their own document alone; needs the attention mask.
        eod_mask_loss: what follows a document's end is not scored.
        create_attention_mask: whether the item has an attention mask.
    """

    end_of_document: int | None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    create_attention_mask: bool = True

    def __call__(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        """The item of one sample."""
        inputs = torch.from_numpy(tokens[:-1].copy())
        labels = torch.from_numpy(tokens[1:].copy())
        ends = inputs == (-1 if self.end_of_document is None else self.end_of_document)
        loss_mask = torch.ones(len(inputs))
        if self.eod_mask_loss:
            loss_mask[ends] = 0.0
        item = {"tokens": inputs, "labels": labels, "loss_mask": loss_mask, "position_ids": self._position_ids(ends)}
        if self.create_attention_mask:
            item["attention_mask"] = self._attention_mask(ends)
        return item

    def _position_ids(self, ends: torch.Tensor) -> torch.Tensor:
        position = torch.arange(len(ends))
        if not self.reset_position_ids:
            return position
        begins = torch.zeros_like(position)
        begins[1:] = torch.where(ends[:-1], position[1:], 0)
        return position - begins.cummax(0).values

    def _attention_mask(self, ends: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(len(ends), len(ends), dtype=torch.bool).triu(1)
        if self.reset_attention_mask:
            document = ends.cumsum(0) - ends.long()
            hidden |= document[:, None] != document[None, :]
        return hidden.unsqueeze(0)
