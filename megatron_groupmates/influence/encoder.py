"""Encoders: from a sample's tokens to the features that the relational model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_groupmates.config import UserError
from megatron_groupmates.model.batch import DocumentRules, Samples, document_inputs
from megatron_groupmates.model.gpt import hidden_states

WINDOW_TOKENS = 512


class Encoder(Protocol):
    """What turns samples into features. All ranks of a tensor-parallel group call together."""

    feature_dim: int

    def encode(self, samples: Samples) -> torch.Tensor:
        """Features float32 ``[n, feature_dim]`` of ``samples``, whatever company they are in."""
        ...


class ProbeEncoder:
    """Hidden states of the language-model checkpoint itself, averaged over tokens: needs no other model."""

    def __init__(self, model: Any, hidden_size: int, rules: DocumentRules) -> None:
        self._model = model
        self._rules = rules
        self.feature_dim = hidden_size

    def encode(self, samples: Samples) -> torch.Tensor:
        """See :class:`Encoder`. The oracle sees the same tokens, cut the same way."""
        # The last token is only ever a target; of a document of one token it is all there is.
        inputs = [sample[: max(1, len(sample) - 1)] for sample in samples]
        # What fills a batch up lies behind all that is averaged: causal attention does not see it.
        tokens = pad_sequence(inputs, batch_first=True, padding_value=self._rules.eot_id)
        hidden = hidden_states(self._model, tokens, *document_inputs(tokens, self._rules)).float()
        lengths = torch.tensor([len(part) for part in inputs], device=tokens.device)
        inside = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(1) < lengths
        return (hidden * inside.unsqueeze(-1)).sum(0) / lengths.unsqueeze(-1)


class HuggingFaceEncoder:
    """A frozen Hugging Face text encoder: mean over windows of the L2-normalised [CLS] vectors (paper section 3.2).

    The sample is detokenised, tokenised with the encoder's tokenizer, and cut into windows of 512 tokens, each with its
    own [CLS] and [SEP]; windows of padding alone do not exist.

    Args:
        name: model name or local path, for instance ``BAAI/bge-base-en-v1.5``.
        detokenise: token ids -> text, by the pool's tokenizer.
        max_tokens: encoder tokens used of each sample.
        device: where the encoder runs.

    Raises:
        UserError: when the model cannot be loaded or its tokenizer has no [CLS] or [SEP].
    """

    def __init__(self, name: str, detokenise: Any, max_tokens: int, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModel.from_pretrained(name).to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(
                f"relational.encoder: cannot load {name!r} ({str(error).splitlines()[0]}); give a Hugging Face encoder's name, "
                "a local directory, or 'probe', which needs no other model"
            ) from error
        if self._tokenizer.cls_token_id is None or self._tokenizer.sep_token_id is None:
            raise UserError(f"relational.encoder: the tokenizer of {name!r} has no [CLS] or no [SEP] token; choose a BERT-like encoder")
        self._detokenise = detokenise
        self._max_tokens = max_tokens
        self._device = device
        self.feature_dim = self._model.config.hidden_size

    @torch.no_grad()
    def encode(self, samples: Samples) -> torch.Tensor:
        """See :class:`Encoder`."""
        windows, owners = self._windows([self._detokenise(sample.tolist()) for sample in samples])
        batch = self._tokenizer.pad({"input_ids": windows}, return_tensors="pt").to(self._device)
        first = torch.nn.functional.normalize(self._model(**batch).last_hidden_state[:, 0].float(), dim=-1)
        owner = torch.tensor(owners, device=self._device)
        total = torch.zeros(len(samples), self.feature_dim, device=self._device).index_add_(0, owner, first)
        return total / torch.bincount(owner, minlength=len(samples)).unsqueeze(-1)

    def _windows(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token windows of all texts and the text each belongs to; an empty text has one window of [CLS] [SEP]."""
        body = WINDOW_TOKENS - 2
        windows, owners = [], []
        for number, text in enumerate(texts):
            ids = self._tokenizer(text, add_special_tokens=False, truncation=True, max_length=self._max_tokens)["input_ids"]
            for first in range(0, max(1, len(ids)), body):
                windows.append([self._tokenizer.cls_token_id, *ids[first : first + body], self._tokenizer.sep_token_id])
                owners.append(number)
        return windows, owners


def encode_rows(
    encoder: Encoder,
    rows: np.ndarray,
    lengths: np.ndarray,
    read_samples: Callable[[np.ndarray], Samples],
    batch_size: int,
    on_samples: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Features float32 ``[len(rows), feature_dim]`` of pool ``rows``, in batches of samples of like length.

    All ranks of a tensor-parallel group call.

    Args:
        encoder: what encodes.
        rows: int64 ``[n]``.
        lengths: int ``[n]``, tokens of each row.
        read_samples: pool rows -> their tokens.
        batch_size: samples at a time.
        on_samples: called with the number of samples after each batch.
    """
    features = np.empty((len(rows), encoder.feature_dim), dtype=np.float32)
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(rows), batch_size):
        part = order[first : first + batch_size]
        features[part] = encoder.encode(read_samples(rows[part])).cpu().numpy()
        on_samples(len(part))
    return features
