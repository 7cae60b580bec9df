"""Core attention on torch's scaled_dot_product_attention: the fast path without Transformer Engine, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class SDPACoreAttention(MegatronModule):
    """Causal attention of the heads of this tensor-parallel rank; drop-in for megatron-core's ``DotProductAttention``.

    Shapes: query ``[s, b, n, d]``, key and value ``[s, b, g, d]`` (g query groups) -> ``[s, b, n * d]``, the dtype of the query.
    """

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
