"""Hugging Face text encoders as the relational model's encoder: windows of a text, their pooling, and training end to end."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.model.batch import Samples
from megatron_groupmates.utils.files import atomic_directory, read_json, write_json

WINDOW_TOKENS = 512
LAYOUTS = ("windows", "cut")
_SETTINGS = "text_encoder.json"
# Tokens that one forward pass takes, padding included. On the CPU more only leaves the caches; on a GPU this fills it,
# and bounds the activations that training holds at a time to 10 to 20 GB for an encoder of the shape of BERT-base.
_TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}


class HuggingFaceEncoder:
    """A Hugging Face text encoder: the mean over a text's windows of the L2-normalised [CLS] vectors (paper section 3.2).

    A sample is detokenised and tokenised with the encoder's tokenizer. Two layouts:

    - ``windows``: cut into windows of 512 tokens, each with a [CLS] and a [SEP] of its own, which count in ``max_tokens``:
      2,048 are four windows at most. There are no windows of padding. An encoder that reads fewer than 512 tokens at
      once gets windows of what it reads: each is a whole input to it all the same.
    - ``cut``, the authors' layout, for parity: [CLS] text [SEP], at most ``max_tokens`` with both, is padded to
      ``max_tokens`` and cut every 512, so that only the first window begins with a [CLS]. What stands first in a window
      stands for it, and windows of padding alone count too; in those, where nothing is to be attended to, attention is
      uniform (additive masks, as transformers had before its boolean ones, which give zeros there).

    No dropout, trained or not: a text's features depend neither on chance, nor (up to rounding) on the texts beside it,
    and a fit is the same for any number of ranks. On CUDA the encoder computes in bfloat16 (autocast), pooling in float32.

    Args:
        name: model name or local path, for instance ``BAAI/bge-base-en-v1.5``.
        detokenise: token ids -> text, by the pool's tokenizer.
        max_tokens: encoder tokens used of each sample.
        device: where the encoder runs.
        layout: ``windows`` or ``cut``.

    Attributes:
        feature_dim: size of the features, the encoder's hidden size.

    Raises:
        UserError: the model cannot be loaded, its tokenizer has no [CLS], [SEP] or [PAD], or layout and sizes do not fit.
    """

    def __init__(
        self, name: str, detokenise: Callable[[list[int]], str], max_tokens: int, device: torch.device, layout: str = "windows"
    ) -> None:
        self._tokenizer, self._model = _load(name, layout)
        self._model.to(device).eval()
        tokenizer = self._tokenizer
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
            raise UserError(f"relational.encoder: the tokenizer of {name!r} has no [CLS], [SEP] or [PAD] token; choose a BERT-like encoder")
        readable = min(tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", WINDOW_TOKENS))
        self.window_tokens = min(WINDOW_TOKENS, readable)
        self._check_sizes(name, layout, max_tokens)
        self._name, self._detokenise, self._max_tokens, self._device, self._layout = name, detokenise, max_tokens, device, layout
        self.feature_dim: int = self._model.config.hidden_size

    def _check_sizes(self, name: str, layout: str, max_tokens: int) -> None:
        if layout not in LAYOUTS:
            raise UserError(f"relational.encoder_layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
        if self.window_tokens < 3:
            raise UserError(f"relational.encoder: {name!r} reads {self.window_tokens} tokens at once; a window needs [CLS], [SEP] and text")
        if layout == "cut" and self.window_tokens < WINDOW_TOKENS:
            raise UserError(
                f"relational.encoder_layout: cut makes windows of {WINDOW_TOKENS} tokens, {name!r} reads {self.window_tokens}; use windows"
            )
        if layout == "cut" and max_tokens % WINDOW_TOKENS:
            raise UserError(
                f"relational.encoder_max_tokens: {max_tokens} is not a multiple of {WINDOW_TOKENS}, which encoder_layout=cut needs"
            )

    def encode(self, samples: Samples) -> torch.Tensor:
        """Features float32 ``[n, feature_dim]`` of ``samples``, whatever company they are in; no gradient."""
        with torch.no_grad():
            return self.features(self.tokenise(samples))

    def tokenise(self, samples: Samples) -> list[np.ndarray]:
        """The encoder's token ids of each sample, without special tokens, as many as ``max_tokens`` leaves room for."""
        texts = [self._detokenise(sample.tolist()) for sample in samples]
        if not texts:
            return []
        if self._layout == "cut":
            room = self._max_tokens - 2
        else:
            whole, rest = divmod(self._max_tokens, self.window_tokens)
            room = whole * (self.window_tokens - 2) + max(0, rest - 2)
        rows = self._tokenizer(texts, add_special_tokens=False, truncation=True, max_length=room)["input_ids"]
        dtype = np.uint16 if len(self._tokenizer) <= 1 << 16 else np.int32
        return [np.array(row, dtype=dtype) for row in rows]

    def features(self, texts: Sequence[np.ndarray]) -> torch.Tensor:
        """Features float32 ``[n, feature_dim]`` of tokenised texts, with gradient where enabled.

        Where a gradient is wanted and one pass is not enough, each pass is computed again on the way back instead of its
        activations being kept: memory is that of one pass, whatever the batch.
        """
        windows, owners = self._windows(texts)
        vectors = self._first_vectors(windows)
        which = torch.arange(len(windows))
        if self._layout == "cut":
            total = self._max_tokens // WINDOW_TOKENS
            missing = total - np.bincount(owners, minlength=len(texts))
            # The windows of padding are all the same one.
            vectors = torch.cat([vectors, self._padding_vector()])
            which = torch.cat([which, torch.full((int(missing.sum()),), len(windows))])
            owners = np.concatenate([owners, np.repeat(np.arange(len(texts)), missing)])
        return mean_of_windows(vectors[which.to(self._device)], torch.from_numpy(owners).to(self._device), len(texts))

    def parameters(self) -> list[torch.nn.Parameter]:
        """What training changes: all that the features depend on; a pooler, which they do not, stays."""
        return [value for name, value in self._model.named_parameters() if not name.startswith("pooler.")]

    def copy(self) -> HuggingFaceEncoder:
        """The same encoder with weights of its own."""
        other = copy.copy(self)
        other._model = copy.deepcopy(self._model)
        return other

    def save(self, directory: Path | str) -> None:
        """Write weights (safetensors), tokenizer and settings to ``directory``, which appears when all is written."""
        with atomic_directory(directory) as aside:
            self._model.save_pretrained(aside)
            self._tokenizer.save_pretrained(aside)
            write_json(aside / _SETTINGS, {"encoder": self._name, "max_tokens": self._max_tokens, "layout": self._layout})

    @classmethod
    def load(cls, directory: Path | str, detokenise: Callable[[list[int]], str], device: torch.device) -> HuggingFaceEncoder:
        """The encoder that ``save`` wrote to ``directory``; needs no hub.

        Raises:
            UserError: there is none.
        """
        settings = Path(directory) / _SETTINGS
        if not settings.is_file():
            raise UserError(f"no trained text encoder in {directory}: it has no {_SETTINGS}; fit the model again")
        kept = read_json(settings)
        encoder = cls(str(directory), detokenise, kept["max_tokens"], device, kept["layout"])
        encoder._name = kept["encoder"]
        return encoder

    def _windows(self, texts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """Token windows of all texts, and int64 the text each belongs to; an empty text has one of [CLS] [SEP]."""
        cls, sep = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        windows: list[np.ndarray] = []
        owners: list[int] = []
        for number, ids in enumerate(texts):
            if self._layout == "cut":
                parts = _cut(np.concatenate([[cls], ids, [sep]]), WINDOW_TOKENS)
            else:
                parts = [np.concatenate([[cls], part, [sep]]) for part in _cut(ids, self.window_tokens - 2)]
            windows.extend(parts)
            owners.extend([number] * len(parts))
        return windows, np.array(owners, dtype=np.int64)

    def _first_vectors(self, windows: Sequence[np.ndarray]) -> torch.Tensor:
        """Unit vectors float32 ``[W, F]`` of what stands first in each window, in passes of windows of like length."""
        lengths = np.array([len(window) for window in windows], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        passes = [order[first:stop] for first, stop in pass_bounds(lengths[order], _TOKENS_PER_PASS[self._device.type])]
        again = torch.is_grad_enabled() and len(passes) > 1
        vectors = [torch.empty(0, self.feature_dim, device=self._device)]
        for part in passes:
            inside = torch.arange(int(lengths[part].max())) < torch.from_numpy(lengths[part]).unsqueeze(-1)
            ids = pad_sequence(
                [torch.from_numpy(windows[number]) for number in part],
                batch_first=True,
                padding_value=self._tokenizer.pad_token_id,
            )
            given = ids.to(self._device), inside.long().to(self._device)
            if again:
                # Without dropout there is no random state to restore.
                vectors.append(checkpoint(self._forward, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                vectors.append(self._forward(*given))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return torch.cat(vectors)[torch.from_numpy(back).to(self._device)]

    def _padding_vector(self) -> torch.Tensor:
        ids = torch.full((1, WINDOW_TOKENS), self._tokenizer.pad_token_id, device=self._device)
        return self._forward(ids, torch.zeros_like(ids))

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(hidden[:, 0].float(), dim=-1)


class TrainedFeatures:
    """The features of a fit's samples by a text encoder that is trained with it (a ``FeatureSource``).

    Each sample is tokenised once, when it is first met, and each call encodes its distinct samples once.

    Args:
        encoder: trained in place; give it a ``copy()`` to keep it.
        read_samples: sample numbers int64 ``[n]`` -> their tokens.
    """

    def __init__(self, encoder: HuggingFaceEncoder, read_samples: Callable[[np.ndarray], Samples]) -> None:
        self.encoder = encoder
        self.feature_dim = encoder.feature_dim
        self._read_samples = read_samples
        self._texts: dict[int, np.ndarray] = {}

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """Features float32 ``[..., F]`` of samples ``numbers`` int64 ``[...]``, with gradient where enabled."""
        distinct, back = torch.unique(numbers, return_inverse=True)
        wanted = distinct.tolist()
        new = [number for number in wanted if number not in self._texts]
        if new:
            self._texts.update(zip(new, self.encoder.tokenise(self._read_samples(np.array(new))), strict=True))
        features = self.encoder.features([self._texts[number] for number in wanted])
        return features[back.to(features.device)]

    def parameters(self) -> list[torch.nn.Parameter]:
        """The encoder's."""
        return self.encoder.parameters()


def mean_of_windows(vectors: torch.Tensor, owners: torch.Tensor, num_texts: int) -> torch.Tensor:
    """Mean float32 ``[num_texts, F]`` over each text's windows of unit ``vectors`` ``[W, F]``.

    Args:
        vectors: of all windows.
        owners: int64 ``[W]``, the text of each window; each text has at least one.
        num_texts: of which all have a window.
    """
    total = torch.zeros(num_texts, vectors.shape[-1], device=vectors.device, dtype=vectors.dtype).index_add(0, owners, vectors)
    return total / torch.bincount(owners, minlength=num_texts).unsqueeze(-1)


def pass_bounds(lengths: np.ndarray, limit: int) -> Iterable[tuple[int, int]]:
    """First and stop of runs of ascending ``lengths`` whose number times their longest is at most ``limit``, one at least."""
    bounds, first = [], 0
    for number, length in enumerate(lengths.tolist()):
        if number > first and (number + 1 - first) * length > limit:
            bounds.append(number)
            first = number
    return itertools.pairwise([0, *bounds, len(lengths)]) if len(lengths) else ()


def _cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Pieces of ``size`` and a shorter last one; of nothing, one empty piece."""
    return [ids[first : first + size] for first in range(0, max(1, len(ids)), size)]


def _load(name: str, layout: str) -> tuple[Any, Any]:
    """Tokenizer and model in float32."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Only eager attention adds its mask, on which the padding windows of the authors' layout depend.
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **({"attn_implementation": "eager"} if layout == "cut" else {}))
    except (OSError, ValueError) as error:
        raise UserError(
            f"relational.encoder: cannot load {name!r} ({str(error).splitlines()[0]}); give a Hugging Face encoder's name, "
            "a local directory, or 'probe', which needs no other model"
        ) from error
    return tokenizer, model
