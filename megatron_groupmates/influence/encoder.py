"""Encoders: from a sample's tokens to the features that the relational model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from megatron_groupmates.model.batch import DocumentRules, Samples, document_inputs, pack
from megatron_groupmates.model.gpt import hidden_states, packed_hidden_states, token_embeddings
from megatron_groupmates.model.losses import IGNORED_LABEL

# On the CPU a longer pass only leaves the caches; a GPU takes all it is given at once.
_CPU_PASS_TOKENS = 4096


class Encoder(Protocol):
    """What turns samples into features. All ranks of a tensor-parallel group call together."""

    feature_dim: int

    def encode(self, samples: Samples) -> torch.Tensor:
        """Features float32 ``[n, feature_dim]`` of ``samples``, whatever company they are in."""
        ...


class ProbeEncoder:
    """The language-model checkpoint itself, which needs no other model: input embeddings and last hidden states, averaged over tokens.

    Both together say more of a sample's influence than the hidden states alone (``tools/bench/RESULTS.md``, "Features of the probe").
    """

    def __init__(self, model: Any, hidden_size: int, rules: DocumentRules) -> None:
        self._model = model
        self._rules = rules
        self.feature_dim = 2 * hidden_size

    def encode(self, samples: Samples) -> torch.Tensor:
        """See :class:`Encoder`. The oracle sees the same tokens, cut the same way."""
        # The last token is only ever a target; of a document of one token it is all there is.
        inputs = [sample[: max(1, len(sample) - 1)] for sample in samples]
        lengths = np.array([len(part) for part in inputs], np.int64)
        device = inputs[0].device
        limit = _CPU_PASS_TOKENS if device.type == "cpu" else int(lengths.sum())
        features = torch.empty(len(inputs), self.feature_dim, device=device)
        for numbers in token_batches(lengths, limit):
            features[torch.from_numpy(numbers).to(device)] = self._means([inputs[number] for number in numbers])
        return features

    def _means(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Means over tokens float32 ``[n, feature_dim]`` of ``inputs``, by one forward pass without padding."""
        lengths = [len(part) for part in inputs]
        if min(lengths) == max(lengths) and not self._rules.reset_attention_mask:
            tokens = torch.stack(inputs)
            states = hidden_states(self._model, tokens, *document_inputs(tokens, self._rules))
            return torch.cat([part.float().mean(0) for part in (token_embeddings(self._model, tokens), states)], dim=-1)
        batch = pack([(part, torch.full_like(part, IGNORED_LABEL)) for part in inputs], self._rules)
        embeddings = token_embeddings(self._model, batch.tokens).squeeze(1)
        both = torch.cat([embeddings.float(), packed_hidden_states(self._model, batch).float()], dim=-1)
        return torch.stack([part.mean(0) for part in both.split(lengths)])


def encode_rows(
    encoder: Encoder,
    rows: np.ndarray,
    lengths: np.ndarray,
    read_samples: Callable[[np.ndarray], Samples],
    batch_tokens: int,
    on_samples: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Features float32 ``[len(rows), feature_dim]`` of pool ``rows``, in batches of samples of like length.

    All ranks of a tensor-parallel group call.

    Args:
        encoder: what encodes.
        rows: int64 ``[n]``.
        lengths: int ``[n]``, tokens that ``read_samples`` gives of each row.
        read_samples: pool rows -> their tokens; called in another thread, for one batch while the one before is encoded.
        batch_tokens: at a time, which a sample by itself may exceed.
        on_samples: called with the number of samples after each batch.
    """
    features = np.empty((len(rows), encoder.feature_dim), dtype=np.float32)
    batches = list(token_batches(lengths, batch_tokens))
    for part, samples in zip(batches, _read_ahead(read_samples, [rows[part] for part in batches]), strict=True):
        features[part] = encoder.encode(samples).cpu().numpy()
        on_samples(len(part))
    return features


def _read_ahead(read_samples: Callable[[np.ndarray], Samples], batches: Sequence[np.ndarray]) -> Iterator[Samples]:
    with ThreadPoolExecutor(max_workers=1) as executor:
        coming = [executor.submit(read_samples, batch) for batch in batches[:1]]
        for batch in batches[1:]:
            coming.append(executor.submit(read_samples, batch))
            yield coming.pop(0).result()
        for last in coming:
            yield last.result()


def token_batches(lengths: np.ndarray, num_tokens: int) -> Iterator[np.ndarray]:
    """Places int64 in ``lengths``, short to long, in batches of at most ``num_tokens`` tokens, which one alone may exceed."""
    order = np.argsort(lengths, kind="stable")
    before = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
    first = 0
    while first < len(order):
        stop = max(first + 1, int(np.searchsorted(before, before[first] + num_tokens, side="right")) - 1)
        yield order[first:stop]
        first = stop
