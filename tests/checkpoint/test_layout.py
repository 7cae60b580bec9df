"""Splitting and merging are inverses at every tensor-parallel size, and equal explicit indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.checkpoint.layout import Layout, layout_of, merge, pieces, split, split_dimension, vocabulary_pieces
from megatron_groupmates.config.errors import UserError

LAYER = "module.decoder.layers.11."
SIZES = st.sampled_from([1, 2, 4])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("embedding.word_embeddings.weight", Layout(0)),
        ("output_layer.weight", Layout(0)),
        (LAYER + "self_attention.linear_qkv.weight", Layout(0)),
        (LAYER + "self_attention.linear_qkv.bias", Layout(0)),
        (LAYER + "self_attention.linear_proj.weight", Layout(1)),
        (LAYER + "self_attention.linear_proj.bias", Layout(None)),
        (LAYER + "mlp.linear_fc1.weight", Layout(0, parts=2)),
        (LAYER + "mlp.linear_fc1.bias", Layout(0, parts=2)),
        (LAYER + "mlp.linear_fc2.weight", Layout(1)),
        (LAYER + "mlp.linear_fc2.bias", Layout(None)),
        (LAYER + "input_layernorm.weight", Layout(None)),
        (LAYER + "pre_mlp_layernorm.weight", Layout(None)),
        (LAYER + "self_attention.q_layernorm.weight", Layout(None)),
        (LAYER + "self_attention.k_layernorm.weight", Layout(None)),
        (LAYER + "self_attention.linear_qkv.layer_norm_weight", Layout(None)),
        (LAYER + "mlp.linear_fc1.layer_norm_weight", Layout(None)),
        ("decoder.final_layernorm.weight", Layout(None)),
        ("embedding.position_embeddings.weight", Layout(None)),
    ],
)
def test_layout_of_each_parameter(name, layout):
    assert layout_of(name, gated=True) == layout
    assert split_dimension(name) == layout.dim


def test_plain_mlp_is_one_matrix():
    assert layout_of("mlp.linear_fc1.weight", gated=False) == Layout(0)


def test_unknown_names_and_unknown_gating():
    with pytest.raises(UserError, match=r"parameter 'lm_head.weight' is not one of megatron-core's GPT"):
        layout_of("lm_head.weight", gated=True)
    with pytest.raises(UserError, match=r"parameter 'mlp.my_linear_fc1.weight' is not one"):
        layout_of("mlp.my_linear_fc1.weight", gated=True)
    with pytest.raises(UserError, match=r"'mlp.linear_fc1.weight' is split differently in a gated MLP"):
        layout_of("mlp.linear_fc1.weight", gated=None)


def test_gated_slices_hold_both_matrices():
    whole = torch.arange(8)
    assert [split(whole, Layout(0, parts=2), rank, 2).tolist() for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(merge([torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])], Layout(0, parts=2)), whole)


@settings(deadline=None)
@given(layout=st.sampled_from([Layout(None), Layout(0), Layout(1), Layout(0, parts=2)]), a=SIZES, b=SIZES, units=st.integers(1, 3))
def test_merge_undoes_split_and_resplitting_goes_through_the_whole(layout, a, b, units):
    whole = torch.arange(8 * units * 8 * units).view(8 * units, 8 * units)
    slices = [split(whole, layout, rank, a) for rank in range(a)]
    assert torch.equal(merge(slices, layout), whole)
    for rank in range(b):
        expected = split(whole, layout, rank, b)
        if layout.dim is not None:
            found = pieces(layout, 8 * units, a, rank, b)
            assert torch.equal(torch.cat([slices[p.rank].narrow(layout.dim, p.start, p.length) for p in found], layout.dim), expected)
        assert torch.equal(split(merge(slices, layout), layout, rank, b), expected)


@settings(deadline=None)
@given(saved=st.integers(1, 8).map(lambda n: 4 * n), a=SIZES, b=SIZES, units=st.integers(1, 12))
def test_vocabulary_pieces_equal_cutting_and_padding_by_hand(saved, a, b, units):
    rows = units * b
    whole = torch.arange(1, saved + 1)
    slices = whole.chunk(a)
    by_hand = torch.cat([whole, torch.zeros(max(0, rows - saved), dtype=torch.int64)])[:rows].chunk(b)
    for rank in range(b):
        found, zeros = vocabulary_pieces(saved, rows, a, rank, b)
        parts = [slices[p.rank].narrow(0, p.start, p.length) for p in found] + [torch.zeros(zeros, dtype=torch.int64)]
        assert torch.equal(torch.cat(parts), by_hand[rank])


def test_sizes_that_do_not_divide():
    with pytest.raises(UserError, match=r"12 rows cannot be divided over 4 tensor-parallel ranks in each of 2 stacked matrices; choose"):
        split(torch.zeros(12, 2), Layout(0, parts=2), 0, 4)
    with pytest.raises(UserError, match="12 rows cannot be divided over 5 tensor-parallel ranks; choose"):
        split(torch.zeros(2, 12), Layout(1), 0, 5)
