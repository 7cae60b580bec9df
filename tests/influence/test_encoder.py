"""Encoders: mean hidden states of the checkpoint, and windows of a frozen Hugging Face encoder made on the spot."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.encoder import HuggingFaceEncoder, ProbeEncoder, encode_rows
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, one_rank, tiny_config

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five"]
CPU = torch.device("cpu")


def test_probe_features_are_mean_hidden_states(tmp_path):
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt, hidden_states

    samples = torch.randint(VOCABULARY, (5, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with one_rank(tmp_path) as groups:
        model = build_gpt(tiny_config("unused"), groups, 1, torch.float32)
        encoder = ProbeEncoder(model, 32, DocumentRules(eot_id=0))
        features = encoder.encode(samples)
        expected = hidden_states(model, samples[:, :-1]).mean(0)
        changed = samples.clone()
        changed[:, -1] = 0
        assert features.shape == (5, encoder.feature_dim) and features.dtype == torch.float32
        torch.testing.assert_close(features, expected)
        # The last token is only ever a target.
        assert torch.equal(encoder.encode(changed), features)
        low = ProbeEncoder(build_gpt(tiny_config("unused"), groups, 1, torch.bfloat16), 32, DocumentRules(eot_id=0)).encode(samples)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, features, rtol=0.1, atol=0.1)


def test_probe_features_of_samples_of_any_lengths(tmp_path):
    """A sample's features do not depend on what fills its batch up, nor on the documents beside it."""
    from megatron_groupmates.model.batch import DocumentRules
    from megatron_groupmates.model.gpt import build_gpt

    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (1, 2, 5, SEQUENCE_LENGTH + 1)]
    samples[2][2] = 0
    for resets in (False, True):
        rules = DocumentRules(0, reset_attention_mask=resets, reset_position_ids=resets)
        directory = tmp_path / str(resets)
        directory.mkdir()
        with one_rank(directory) as groups:
            config = tiny_config("unused", data__reset_position_ids=resets)
            encoder = ProbeEncoder(build_gpt(config, groups, 1, torch.float32), 32, rules)
            together = encoder.encode(samples)
            alone = torch.cat([encoder.encode([sample]) for sample in samples])
        assert together.shape == (4, 32) and torch.isfinite(together).all()
        torch.testing.assert_close(together, alone)


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights and a word-level tokenizer, saved as a Hugging Face model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("encoder")
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=512
    ).save_pretrained(directory)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.5,
        )
    ).save_pretrained(directory)
    return directory


def detokenise(ids: list[int]) -> str:
    """Ids below 8 are words; the rest, which pads these samples, is nothing."""
    return " ".join(WORDS[number] for number in ids if number < len(WORDS))


def sample_of(num_words: int, length: int = 1200, seed: int = 0) -> torch.Tensor:
    generator = random.Random(seed)
    return torch.tensor([generator.randrange(len(WORDS)) for _ in range(num_words)] + [99] * (length - num_words))


@torch.no_grad()
def slow_features(directory: Path, text: str, max_tokens: int) -> torch.Tensor:
    """One window at a time, ids put together by hand."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory).eval()
    ids = [4 + WORDS.index(word) for word in text.split()][:max_tokens]
    windows = [ids[first : first + 510] for first in range(0, len(ids), 510)] or [[]]
    vectors = []
    for window in windows:
        vector = model(input_ids=torch.tensor([[2, *window, 3]])).last_hidden_state[0, 0]
        vectors.append(vector / vector.norm())
    return torch.stack(vectors).mean(0)


@pytest.mark.parametrize("max_tokens", [2048, 700, 100])
def test_features_are_means_over_windows(encoder_directory, max_tokens):
    encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, max_tokens, CPU)
    assert encoder.feature_dim == 16
    # No text, one window, exactly one, one token more, and three.
    samples = [sample_of(count, seed=count) for count in (0, 3, 510, 511, 1150)]
    features = encoder.encode(torch.stack(samples))
    assert features.shape == (5, 16) and features.dtype == torch.float32
    for sample, found in zip(samples, features, strict=True):
        expected = slow_features(encoder_directory, detokenise(sample.tolist()), max_tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in features.tolist()}) == 5


def test_windows_have_512_tokens_with_their_own_ends(encoder_directory):
    encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, 2048, CPU)
    windows, owners = encoder._windows([detokenise(sample_of(count).tolist()) for count in (511, 0, 1150)])
    assert [len(window) for window in windows] == [512, 3, 2, 512, 512, 132] and owners == [0, 0, 1, 2, 2, 2]
    assert all(window[0] == 2 and window[-1] == 3 and not {2, 3} & set(window[1:-1]) for window in windows)


def test_what_cannot_be_loaded_is_a_user_error(tmp_path):
    missing = tmp_path / "no-such-encoder"
    with pytest.raises(UserError, match=r"relational.encoder: cannot load '\S+no-such-encoder' \(.+\); give a Hugging Face encoder's name"):
        HuggingFaceEncoder(str(missing), detokenise, 512, CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"relational\.encoder: cannot load"):
        HuggingFaceEncoder(str(tmp_path / "empty"), detokenise, 512, CPU)


def test_an_encoder_without_cls_is_refused(encoder_directory, tmp_path):
    directory = shutil.copytree(encoder_directory, tmp_path / "encoder")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["cls_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"the tokenizer of '\S+' has no \[CLS\] or no \[SEP\] token; choose a BERT-like encoder"):
        HuggingFaceEncoder(str(directory), detokenise, 512, CPU)


class Doubler:
    """An encoder that remembers the sizes of its batches."""

    feature_dim = 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(samples))
        return torch.stack([samples[:, 0], 2 * samples[:, 0]], -1).float()


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (4, [4]), (10, [4, 4, 2])])
def test_rows_are_encoded_in_batches(count, sizes):
    encoder, done = Doubler(), []
    rows = np.arange(count) * 7

    # Every third sample is long: batches go from short to long, features come back in place.
    lengths = np.where(np.arange(count) % 3 == 0, 9, 2)
    seen: list[int] = []

    def read_samples(part: np.ndarray) -> Any:
        seen.extend(part.tolist())
        return torch.from_numpy(part)[:, None]

    features = encode_rows(encoder, rows, lengths, read_samples, 4, done.append)
    assert seen == sorted(rows.tolist(), key=lambda row: lengths[row // 7])
    assert features.dtype == np.float32 and features.tolist() == [[row, 2 * row] for row in rows.tolist()]
    assert encoder.sizes == sizes == done
