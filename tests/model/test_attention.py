"""Attention within segments equals plain softmax attention of each segment by itself, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.model import attention
from megatron_groupmates.model.attention import AttendsWithinSegments, Segments, segment_attention


def plain_segments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax over one block-diagonal causal mask; shapes as of ``segment_attention``."""
    s, _, n, d = query.shape
    owner = torch.arange(len(lengths), device=query.device).repeat_interleave(torch.tensor(lengths, device=query.device))
    hidden = (owner[:, None] != owner) | torch.ones(s, s, dtype=torch.bool, device=query.device).triu(1)
    k, v = (x[:, 0].repeat_interleave(n // x.shape[2], 1) for x in (key, value))
    scores = torch.einsum("snd,tnd->nst", query[:, 0], k) / math.sqrt(d)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("nst,tnd->snd", weights, v).reshape(s, 1, n * d)


def random_inputs(total: int, num_groups: int, dtype: torch.dtype, device: str = "cpu", d: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, 1, 4, d), (total, 1, num_groups, d), (total, 1, num_groups, d)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), num_groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_segments_are_what_they_are_alone(lengths, num_groups):
    inputs = random_inputs(sum(lengths), num_groups, torch.float64)
    segments = Segments.of(lengths, max(lengths), torch.device("cpu"))
    found, expected = segment_attention(*inputs, segments), plain_segments(*inputs, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_scale_is_followed():
    inputs = random_inputs(5, 4, torch.float64)
    segments = Segments.of([2, 3], 3, torch.device("cpu"))
    scaled = segment_attention(*inputs, segments, scale=0.1)
    expected = plain_segments(inputs[0] * 0.1 * math.sqrt(8), *inputs[1:], [2, 3])
    torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("total", "batch"), [(6, 1), (5, 2)])
def test_segments_must_be_the_whole_of_one_sequence(total, batch):
    x = torch.randn(total, batch, 4, 8)
    with pytest.raises(AssertionError, match=f"segments of 5 tokens for a sequence of {total} by {batch}"):
        segment_attention(x, x, x, Segments.of([2, 3], 3, torch.device("cpu")))


class Own:
    """Stands for another library's core attention."""

    softmax_scale = None

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        return query, attn_mask_type, packed_seq_params


class Packing(AttendsWithinSegments, Own):
    pass


def test_mixed_into_another_attention_only_segments_are_taken_over():
    inputs = random_inputs(5, 4, torch.float64)
    segments = Segments.of([2, 3], 3, torch.device("cpu"))
    assert Packing().forward(*inputs, None, attn_mask_type="causal") == (inputs[0], "causal", None)
    found = Packing().forward(*inputs, None, attn_mask_type="causal", packed_seq_params=segments)
    torch.testing.assert_close(found, plain_segments(*inputs, [2, 3]), rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError, match="take the place of a mask"):
        Packing().forward(*inputs, torch.zeros(1, 1, 5, 5, dtype=torch.bool), packed_seq_params=segments)


@pytest.mark.gpu
@pytest.mark.parametrize("num_groups", [4, 2])
def test_the_kernel_of_a_gpu_equals_segment_by_segment(num_groups, monkeypatch):
    lengths = [1, 130, 7, 512, 64]
    inputs = random_inputs(sum(lengths), num_groups, torch.bfloat16, "cuda", d=64)
    segments = Segments.of(lengths, max(lengths), torch.device("cuda"))
    direction = torch.randn(sum(lengths), 1, 4 * 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for kernel in (attention._varlen_kernel(), None):
        monkeypatch.setattr(attention, "_varlen_kernel", lambda kernel=kernel: kernel)
        out = segment_attention(*inputs, segments)
        results.append([out, *torch.autograd.grad(out, inputs, direction)])
    plain = [x.double() for x in inputs]
    expected = plain_segments(*plain, lengths)
    for name, result in zip(("varlen", "segments"), results, strict=True):
        assert float((result[0].double() - expected).norm() / expected.norm()) < 1e-2, name
    for one, other in zip(*results, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 2e-2
