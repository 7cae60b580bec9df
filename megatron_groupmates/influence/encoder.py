"""Encoders: from a sample's tokens to the features that the relational model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.model.gpt import hidden_states

WINDOW_TOKENS = 512


class Encoder(Protocol):
    """What turns samples into features. All ranks of a tensor-parallel group call together."""

    feature_dim: int

    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        """int64 ``[n, s + 1]`` samples -> float32 ``[n, feature_dim]`` features."""
        ...


class ProbeEncoder:
    """Hidden states of the language-model checkpoint itself, averaged over tokens: needs no other model."""

    def __init__(self, model: Any, hidden_size: int) -> None:
        self._model = model
        self.feature_dim = hidden_size

    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoder`. The oracle sees the same tokens, cut the same way."""
        return hidden_states(self._model, samples[:, :-1].contiguous()).float().mean(0)


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
    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoder`."""
        windows, owners = self._windows([self._detokenise(sample) for sample in samples.tolist()])
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
    read_samples: Any,
    batch_size: int,
    on_samples: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Features float32 ``[len(rows), feature_dim]`` of pool ``rows``, in batches. All ranks of a tensor-parallel group call."""
    features = np.empty((len(rows), encoder.feature_dim), dtype=np.float32)
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        features[first : first + batch_size] = encoder.encode(read_samples(part)).cpu().numpy()
        on_samples(len(part))
    return features
