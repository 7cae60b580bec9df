"""Core attention on torch's own kernels: the fast path without Transformer Engine, and packed samples with any layers."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Segments(PackedSeqParams):
    """How one sequence falls into segments whose tokens attend to their own segment alone; from :meth:`of`.

    megatron-core hands it through to the core attention. Its format is megatron's for unpacked sequences, so that rotary
    angles follow the position ids of the batch rather than the segments.

    Attributes:
        lengths: tokens of each segment, in order; together the whole sequence.
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: list[int], num_positions: int, device: torch.device) -> Segments:
        """Segments of these lengths in a sequence whose position ids are below ``num_positions``."""
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=num_positions,
            max_seqlen_kv=num_positions,
            lengths=tuple(lengths),
        )


class AttendsWithinSegments:
    """Mixed into a core attention: causal attention within :class:`Segments`, and the class's own for everything else."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *arguments: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Shapes as of :class:`SDPACoreAttention`, with b = 1 for segments."""
        if isinstance(packed_seq_params, Segments):
            assert attention_mask is None, "segments take the place of a mask"
            return segment_attention(query, key, value, packed_seq_params, getattr(self, "softmax_scale", None))
        options["packed_seq_params"] = packed_seq_params
        return super().forward(query, key, value, attention_mask, *arguments, **options)  # type: ignore[misc]


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float | None = None
) -> torch.Tensor:
    """Causal attention within each segment: ``[s, 1, n, d]``, key and value ``[s, 1, g, d]`` -> ``[s, 1, n * d]``.

    One variable-length kernel where the device has it; otherwise segment by segment, so that no work goes into pairs of
    tokens of different segments.
    """
    s, b, n, d = query.shape
    assert b == 1 and s == sum(segments.lengths), f"segments of {sum(segments.lengths)} tokens for a sequence of {s} by {b}"
    grouped = key.shape[2] != n
    kernel = _varlen_kernel()
    if kernel is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        longest = max(segments.lengths)
        bounds = segments.cu_seqlens_q
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        out = kernel(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped)
        return out.reshape(s, 1, n * d)
    q, k, v = (x.permute(1, 2, 0, 3).split(segments.lengths, 2) for x in (query, key, value))
    parts = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=grouped).permute(2, 0, 1, 3)
        for part in zip(q, k, v, strict=True)
    ]
    return torch.cat(parts).reshape(s, 1, n * d)


@functools.cache
def _varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """torch's variable-length attention; None for a torch that has none or one without windows, which make it causal."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    wanted = {"window_size", "scale", "enable_gqa"}
    return function if wanted <= set(inspect.signature(function).parameters) else None


class _WholeSequenceAttention(MegatronModule):
    """Attention of whole sequences, causal or by a mask."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "pretraining here uses no dropout"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend causally; with ``attention_mask`` (bool ``[b, 1, s, s]``, True = hidden, megatron's convention) by that mask."""
        assert attention_bias is None and packed_seq_params is None, "not supported by SDPACoreAttention"
        s, b, n, d = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible = None if attention_mask is None else ~attention_mask
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.softmax_scale, enable_gqa=k.shape[1] != n
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


class SDPACoreAttention(AttendsWithinSegments, _WholeSequenceAttention):
    """Causal attention of the heads of this tensor-parallel rank; drop-in for megatron-core's ``DotProductAttention``.

    Shapes: query ``[s, b, n, d]``, key and value ``[s, b, g, d]`` (g query groups) -> ``[s, b, n * d]``, the dtype of the query.
    """
