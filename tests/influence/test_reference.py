"""The reference set: the first samples of a held-out pool, every token scored, in batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.reference import ReferenceSet, load_reference
from tests.pool.helpers import make_pool

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
    with pytest.raises(UserError, match=r"training sequences of 6 tokens need samples of 7 tokens, but 16 of the 16 samples"):
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
