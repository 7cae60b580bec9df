"""The tokenizer of a pool."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess.encode import encode_texts
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from tests.pool.helpers import make_pool, tiny_tokenizer, tokenizer_json


@pytest.mark.parametrize("text", ["a cat<|endoftext|>on", "<|padding|>", "<|endoftext|><|endoftext|>", "a <|endof"])
def test_literal_special_tokens_are_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    [tokens] = tokenizer.encode_batch([text])
    assert not tokenizer.is_control[tokens].any()
    assert tokenizer.decode(tokens) == text
    stock = Tokenizer.from_str(tokenizer_json().decode()).encode(text, add_special_tokens=False).ids
    assert tokenizer.is_control[stock].any() == ("|>" in text)


@pytest.mark.parametrize("text", ["the cat sat", " leading", "accents \u00e9\u4e2d\U0001f600", "tabs\t\n\n  "])
def test_round_trip(text: str) -> None:
    tokenizer = tiny_tokenizer()
    [tokens] = tokenizer.encode_batch([text])
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(np.append(tokens, tokenizer.eot_id)) == text


def test_no_text_is_cut_or_padded() -> None:
    stock = Tokenizer.from_str(tokenizer_json().decode())
    stock.enable_truncation(4)
    stock.enable_padding(length=9)
    tokenizer = PoolTokenizer(stock.to_str().encode(), "cut")
    assert [len(tokens) for tokens in tokenizer.encode_batch(["a", "qzx" * 50])] == [1, 150]


def test_load_from_file_and_directory(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    for source in (str(path), str(tmp_path)):
        tokenizer = PoolTokenizer.load(source)
        assert tokenizer.content == tokenizer_json()
        assert (tokenizer.eot_id, tokenizer.vocab_size, tokenizer.name) == (0, 300, source)
    assert PoolTokenizer.load(str(path), eot="<|padding|>").eot_id == 1


@pytest.mark.parametrize("eos", ["<|padding|>", {"content": "<|padding|>"}])
def test_a_directory_names_its_end_of_text_token(tmp_path: Path, eos: object) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert PoolTokenizer.load(str(tmp_path)).eot_id == 1
    assert PoolTokenizer.load(str(tmp_path), eot="<|endoftext|>").eot_id == 0


def test_load_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Hugging Face name resolves to; the library's own loader, on a directory it saved itself."""
    import transformers

    backend = Tokenizer.from_str(tokenizer_json().decode())
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|padding|>").save_pretrained(tmp_path)
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: load(str(tmp_path)))
    tokenizer = PoolTokenizer.load("owner/name")
    assert (tokenizer.name, tokenizer.eot_id, tokenizer.vocab_size) == ("owner/name", 1, 300)
    assert tokenizer.encode_batch(["the cat"])[0].tolist() == tiny_tokenizer().encode_batch(["the cat"])[0].tolist()


def test_a_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(name: str) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"cannot load tokenizer 'owner/name': .* Hugging Face name .*couldn't connect"):
        PoolTokenizer.load("owner/name")


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no tokenizer at .*/none; check the path"):
        PoolTokenizer.load(str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a Hugging Face tokenizer.json"):
        PoolTokenizer.load(str(tmp_path))
    with pytest.raises(UserError, match=r"tiny has no token '<eos>' to put after each document; .* with --eot"):
        PoolTokenizer(tokenizer_json(), "tiny", "<eos>")
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
    with pytest.raises(UserError, match=r"bare has no token '<\|endoftext\|>'"):
        PoolTokenizer(bare, "bare")


def test_texts_that_make_no_sample() -> None:
    """A model whose own vocabulary holds the literal token cannot write it as text; unknown characters are kept."""
    stock = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    stock.add_special_tokens(["<unk>", "</s>"])
    tokenizer = PoolTokenizer(stock.to_str().encode(), "unigram", "</s>")
    tokens, lengths = encode_texts(tokenizer, ["aa", "a</s>", "az", ""])
    assert lengths.tolist() == [3, -1, 3, 0]
    assert tokens.tolist() == [2, 2, 1, 2, 0, 1]


def test_the_engine_and_why(caplog: pytest.LogCaptureFixture) -> None:
    """The fast engine where it is proven; else the library's own, which makes the same ids, and a word on why."""
    proven = tiny_tokenizer()
    assert (proven.engine, proven.engine_reason) == ("tiktoken", "its ids are proven equal to those of tokenizers")
    config = json.loads(tokenizer_json())
    config["normalizer"] = {"type": "NFKC"}
    unproven = PoolTokenizer(json.dumps(config).encode(), "unusual")
    assert (unproven.engine, unproven.engine_reason) == ("tokenizers", "its normalizer is NFKC, not NFC or none")
    assert caplog.messages == ["tokenizer unusual is encoded by the slower engine: its normalizer is NFKC, not NFC or none"]
    texts = ["the cat sat", "a <|endoftext|>", "", " 12\n\n x"]
    for fast, slow in zip(proven.encode_batch(texts), unproven.encode_batch(texts), strict=True):
        assert fast.dtype == slow.dtype == np.uint16
        assert fast.tolist() == slow.tolist()
    assert pickle.loads(pickle.dumps(proven)).engine == "tiktoken"


@pytest.mark.parametrize("name", ["tiny", "unigram"])
def test_lone_surrogates_are_refused(name: str) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0)], unk_id=0)).to_str().encode()
    tokenizer = tiny_tokenizer() if name == "tiny" else PoolTokenizer(unigram, name, "</s>")
    with pytest.raises((TypeError, UnicodeEncodeError)):
        tokenizer.encode_batch(["\ud800"])


def test_of_pool_and_pickle(tmp_path: Path) -> None:
    index = make_pool(tmp_path)
    tokenizer = PoolTokenizer.of_pool(index)
    assert tokenizer.fingerprint == index.tokenizer["fingerprint"]
    copied = pickle.loads(pickle.dumps(PoolTokenizer(tokenizer_json(), "x", "<|padding|>")))
    assert (copied.eot_id, copied.name) == (1, "x")
