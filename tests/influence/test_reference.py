"""The reference set: the first samples of a held-out pool, every token scored, in batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.reference import ReferenceSet, load_reference
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


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_batches_hold_every_example_once_in_order(batch_size):
    tokens, labels = torch.arange(20).reshape(5, 4), torch.arange(20).reshape(5, 4) - 100
    batches = ReferenceSet(tokens=tokens, labels=labels).batches(batch_size)
    assert all(len(part) == len(answers) <= batch_size for part, answers in batches)
    assert torch.equal(torch.cat([part for part, _ in batches]), tokens)
    assert torch.equal(torch.cat([answers for _, answers in batches]), labels)


def test_examples_of_several_lengths(tmp_path):
    masks = [[0, 1, 1], [0, 0, 0, 1, 0, 1, 0], [0, 1], [0, 0, 1, 0, 1]]
    index = make_reference_set(tmp_path, [np.arange(len(mask)) + 10 for mask in masks], masks)
    reference = load_reference(index, 8, 3, CPU)
    assert reference.labels.tolist() == [[11, 12, *[-100] * 4], [-100, -100, 13, -100, 15, -100], [11, *[-100] * 5]]
    assert reference.tokens.tolist() == [[10, 11, 0, 0, 0, 0], [10, 11, 12, 13, 14, 15], [10, 0, 0, 0, 0, 0]]
    assert reference.num_scored_tokens == 5
    longest, others = reference.batches(1)[0], reference.batches(2)
    assert longest[0].tolist() == [[10, 11, 12, 13, 14]], "nothing behind the last scored token is read"
    assert [tokens.shape for tokens, _ in others] == [(2, 5), (1, 1)]
    assert sum(int((labels >= 0).sum()) for _, labels in others) == 5


def test_an_example_without_scored_tokens_keeps_its_place():
    labels = torch.tensor([[-100, -100], [3, -100]])
    batches = ReferenceSet(tokens=torch.zeros_like(labels), labels=labels).batches(2)
    assert [tokens.shape for tokens, _ in batches] == [(2, 1)]
