"""The probe encoder: mean embeddings and hidden states of the checkpoint; and encoding in batches."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import UserError
from megatron_groupmates.influence import encoder as encoder_module
from megatron_groupmates.influence.encoder import ProbeEncoder, encode_rows, token_batches
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, one_rank, tiny_config


def test_probe_features_are_mean_embeddings_and_hidden_states(tmp_path):
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt, hidden_states

    samples = torch.randint(VOCABULARY, (5, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with one_rank(tmp_path) as groups:
        model = build_gpt(tiny_config("unused"), groups, 1, torch.float32)
        encoder = ProbeEncoder(model, 32, DocumentRules(eot_id=0))
        features = encoder.encode(samples)
        embedded = model.embedding.word_embeddings.weight[samples[:, :-1]].mean(1)
        expected = torch.cat([embedded, hidden_states(model, samples[:, :-1]).mean(0)], dim=1)
        changed = samples.clone()
        changed[:, -1] = 0
        assert features.shape == (5, encoder.feature_dim) and features.dtype == torch.float32
        torch.testing.assert_close(features, expected)
        # The last token is only ever a target.
        assert torch.equal(encoder.encode(changed), features)
        low = ProbeEncoder(build_gpt(tiny_config("unused"), groups, 1, torch.bfloat16), 32, DocumentRules(eot_id=0)).encode(samples)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, features, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("resets", [False, True])
def test_probe_features_of_samples_of_any_lengths(tmp_path, monkeypatch, resets):
    """A sample's features depend neither on the samples beside it nor on the pass it is in: they are those of it alone, padded."""
    from megatron_groupmates.model.batch import DocumentRules, document_inputs
    from megatron_groupmates.model.gpt import build_gpt, hidden_states

    generator = torch.Generator().manual_seed(1)
    lengths = (SEQUENCE_LENGTH + 1, 1, 2, 5, 7, SEQUENCE_LENGTH + 1)
    samples = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    samples[0][4] = samples[3][2] = 0
    rules = DocumentRules(0, reset_attention_mask=resets, reset_position_ids=resets)
    with one_rank(tmp_path) as groups:
        model = build_gpt(tiny_config("unused", data__reset_position_ids=resets), groups, 1, torch.float32)
        encoder = ProbeEncoder(model, 32, rules)
        together = encoder.encode(samples)
        expected = []
        for sample in samples:
            read = sample[: max(1, len(sample) - 1)]
            padded = torch.nn.functional.pad(read, (0, SEQUENCE_LENGTH - len(read))).unsqueeze(0)
            embedded = model.embedding.word_embeddings.weight[read].mean(0)
            hidden = hidden_states(model, padded, *document_inputs(padded, rules))[: len(read), 0].mean(0)
            expected.append(torch.cat([embedded, hidden]))
        monkeypatch.setattr(encoder_module, "_CPU_PASS_TOKENS", 8)
        in_passes = encoder.encode(samples)
    assert together.shape == (6, 64) and together.dtype == torch.float32
    torch.testing.assert_close(together, torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(in_passes, together, rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 40))
@settings(deadline=None)
def test_batches_hold_every_sample_once_and_as_many_as_fit(lengths, num_tokens):
    found = list(token_batches(np.array(lengths, np.int64), num_tokens))
    places = np.concatenate([np.zeros(0, np.int64), *found])
    assert sorted(places.tolist()) == list(range(len(lengths)))
    sizes = [[lengths[place] for place in part] for part in found]
    assert [length for part in sizes for length in part] == sorted(lengths)
    assert all(len(part) == 1 or sum(part) <= num_tokens for part in sizes)
    assert all(sum(part) + following[0] > num_tokens for part, following in itertools.pairwise(sizes)), "none has room for the next"


class Doubler:
    """An encoder that remembers the sizes of its batches."""

    feature_dim = 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(samples))
        return torch.stack([samples[:, 0], 2 * samples[:, 0]], -1).float()


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (10, [6, 2, 2])])
def test_rows_are_encoded_in_batches(count, sizes):
    encoder, done = Doubler(), []
    rows = np.arange(count) * 7

    # Every third sample is long: batches go from short to long, features come back in place.
    lengths = np.where(np.arange(count) % 3 == 0, 9, 2)
    seen: list[int] = []

    def read_samples(part: np.ndarray) -> Any:
        seen.extend(part.tolist())
        return torch.from_numpy(part)[:, None]

    features = encode_rows(encoder, rows, lengths, read_samples, 20, done.append)
    assert seen == sorted(rows.tolist(), key=lambda row: lengths[row // 7])
    assert features.dtype == np.float32 and features.tolist() == [[row, 2 * row] for row in rows.tolist()]
    assert encoder.sizes == sizes == done


def test_one_batch_is_read_ahead_and_no_more():
    asked: list[int] = []
    encoded: list[int] = []

    def read_samples(part: np.ndarray) -> Any:
        asked.extend(part.tolist())
        return torch.from_numpy(part)[:, None]

    class Waiting(Doubler):
        def encode(self, samples: torch.Tensor) -> torch.Tensor:
            encoded.append(int(samples[0, 0]))
            wanted, patience = min(len(encoded) + 1, 5), time.monotonic() + 120
            while len(asked) < wanted and time.monotonic() < patience:
                time.sleep(0.001)
            assert len(asked) == wanted
            return super().encode(samples)

    rows = np.arange(5)
    assert encode_rows(Waiting(), rows, np.ones(5, np.int64), read_samples, 1)[:, 0].tolist() == rows.tolist() == encoded


def test_a_sample_that_cannot_be_read_ends_the_work():
    def read_samples(part: np.ndarray) -> Any:
        if part[0] == 3:
            raise UserError("row 3 is damaged")
        return torch.from_numpy(part)[:, None]

    encoder = Doubler()
    with pytest.raises(UserError, match="row 3 is damaged"):
        encode_rows(encoder, np.arange(5), np.ones(5, np.int64), read_samples, 1)
    assert encoder.sizes == [1, 1, 1]
