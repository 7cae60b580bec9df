"""Training a tokenizer on raw documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_groupmates.pool.preprocess.records import find_inputs
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from tools import train_tokenizer

TEXTS = [f"def function_{number}(argument):\n    return argument + {number}\n" * 20 for number in range(30)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two raw files, one compressed, with a line that is no document."""
    folder = tmp_path_factory.mktemp("raw")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:15]) + "broken\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[15:]).encode()))
    return folder


@pytest.fixture(scope="module")
def tokenizer(raw: Path) -> Tokenizer:
    """A tokenizer trained on the raw files."""
    return train_tokenizer.train(TEXTS, 300)


def run(raw: Path, output: Path, *arguments: str) -> int:
    return train_tokenizer.main(["--input", str(raw), "--output", str(output), "--vocab-size", "300", *arguments])


def test_the_folder_loads_with_transformers_and_as_a_pool_tokenizer(raw: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert run(raw, tmp_path / "tokenizer") == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(loaded) == 300
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 0)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|padding|>", 1)
    assert loaded.decode(loaded(TEXTS[3])["input_ids"]) == TEXTS[3]
    assert len(loaded(TEXTS[3])["input_ids"]) < len(TEXTS[3]) / 3
    pool_tokenizer = PoolTokenizer.load(str(tmp_path / "tokenizer"))
    assert (pool_tokenizer.vocab_size, pool_tokenizer.eot_id) == (300, 0)


@settings(deadline=None, suppress_health_check=[], max_examples=60)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_is_encoded_without_loss(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_same_documents_give_the_same_tokenizer(raw: Path, tmp_path: Path) -> None:
    assert run(raw, tmp_path / "a") == 0 and run(raw, tmp_path / "b") == 0
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_text_is_shared_equally_between_files(raw: Path) -> None:
    files, _ = find_inputs([raw])
    assert list(train_tokenizer.shared_texts(files, 10**9)) == TEXTS
    size = len(TEXTS[0].encode())
    assert list(train_tokenizer.shared_texts(files, 4 * size)) == [*TEXTS[0:2], *TEXTS[15:17]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vocab-size", "257"), "--vocab-size 257: at least 258 are needed (all bytes and 2 special tokens)"),
        (("--vocab-size", "50000"), "--vocab-size 50000: the documents have repeated text for only"),
        (("--max-bytes", "0"), "--max-bytes 0: must be positive"),
        (("--input", "/nowhere/*.jsonl"), "matches no file"),
    ],
)
def test_impossible_requests_say_why(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(raw, tmp_path / "tokenizer", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "tokenizer").exists()


def test_an_existing_folder_is_not_overwritten(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raw, tmp_path) == 1
    assert f"--output {tmp_path} exists already" in capsys.readouterr().err
