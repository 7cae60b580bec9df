"""The reference set: samples of a held-out pool, packed into batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.reference import ReferenceSet, first_fit, load_reference
from megatron_groupmates.model.batch import DocumentRules
from tests.pool.helpers import make_pool, make_reference_set

CPU = torch.device("cpu")


@pytest.mark.parametrize(("asked", "found"), [(1, 1), (6, 6), (16, 16), (99, 16)])
def test_first_samples_of_the_pool(tmp_path, asked, found):
    samples = [np.arange(9) + row for row in range(16)]
    pool = make_pool(tmp_path, (5, 8, 3), samples=samples)
    reference = load_reference(pool, 8, asked, CPU)
    assert torch.equal(reference.tokens, torch.arange(8) + torch.arange(found)[:, None])
    assert torch.equal(reference.labels, reference.tokens + 1)
    assert reference.num_scored_tokens == 8 * found


def test_another_sequence_length_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"sequences of 6 tokens need samples of 7 tokens, but 16 of the 16 samples"):
        load_reference(make_pool(tmp_path), 6, 4, CPU)


def test_only_scored_tokens_count():
    labels = torch.tensor([[1, -100, 0], [-100, -100, 2]])
    assert ReferenceSet(tokens=torch.zeros_like(labels), labels=labels).num_scored_tokens == 3


RULES = DocumentRules(eot_id=0)


@given(sizes=st.lists(st.integers(1, 12), max_size=20), capacity=st.integers(1, 15))
@settings(max_examples=60, deadline=None)
def test_first_fit(sizes, capacity):
    bins = first_fit(sizes, capacity)
    assert sorted(position for numbers in bins for position in numbers) == list(range(len(sizes)))
    for number, numbers in enumerate(bins):
        assert numbers == sorted(numbers)
        assert sum(sizes[position] for position in numbers) <= capacity or len(numbers) == 1
        for position in numbers:
            for earlier in bins[:number]:
                # No earlier bin had room when its turn came.
                assert sum(sizes[other] for other in earlier if other < position) + sizes[position] > capacity


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, [[0], [1], [2]]), (8, [[0, 1], [2]]), (12, [[0, 1, 2]])])
def test_batches_hold_every_example_once_in_order(num_tokens, expected):
    tokens, labels = torch.arange(12).reshape(3, 4), torch.arange(12).reshape(3, 4) + 1
    batches = ReferenceSet(tokens=tokens, labels=labels).batches(num_tokens, RULES)
    assert [batch.tokens[0].tolist() for batch in batches] == [tokens[rows].reshape(-1).tolist() for rows in expected]
    assert [batch.labels.tolist() for batch in batches] == [labels[rows].reshape(-1).tolist() for rows in expected]
    assert [batch.segments.lengths for batch in batches] == [(4,) * len(rows) for rows in expected]


def test_examples_of_several_lengths(tmp_path):
    masks = [[0, 1, 1], [0, 0, 0, 1, 0, 1, 0], [0, 1], [0, 0, 1, 0, 1]]
    index = make_reference_set(tmp_path, [np.arange(len(mask)) + 10 for mask in masks], masks)
    reference = load_reference(index, 8, 3, CPU)
    assert reference.labels.tolist() == [[11, 12, *[-100] * 4], [-100, -100, 13, -100, 15, -100], [11, *[-100] * 5]]
    assert reference.tokens.tolist() == [[10, 11, 0, 0, 0, 0], [10, 11, 12, 13, 14, 15], [10, 0, 0, 0, 0, 0]]
    assert reference.num_scored_tokens == 5
    first, second = reference.batches(6, RULES)
    assert first.tokens.tolist() == [[10, 11, 12, 13, 14, 10]], "longest first, nothing behind the last scored token"
    assert first.position_ids.tolist() == [[0, 1, 2, 3, 4, 0]]
    assert first.segments.lengths == (5, 1)
    assert (first.scored.tolist(), first.labels.tolist()) == ([2, 4, 5], [13, 15, 11])
    assert (second.tokens.tolist(), second.labels.tolist()) == ([[10, 11]], [11, 12])


def test_an_example_without_scored_tokens_is_left_out():
    labels = torch.tensor([[-100, -100], [3, -100]])
    (batch,) = ReferenceSet(tokens=torch.tensor([[1, 1], [2, 2]]), labels=labels).batches(100, RULES)
    assert (batch.tokens.tolist(), batch.labels.tolist()) == ([[2]], [3])


def test_the_second_part_of_a_pool(tmp_path):
    pool = make_pool(tmp_path, (5, 8, 3), samples=[np.arange(9) + row for row in range(16)])
    assert load_reference(pool, 8, 4, CPU, first=3).tokens[:, 0].tolist() == [3, 4, 5, 6]
    assert load_reference(pool, 8, 4, CPU, first=14).tokens[:, 0].tolist() == [14, 15]
