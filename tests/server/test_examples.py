"""Example documents of a selection: which are shown, and what of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.server import examples
from megatron_groupmates.server.examples import example_documents, rejected_first
from tests.pool.helpers import make_pool, tiny_tokenizer

EMPTY = np.empty(0, np.int64)


@settings(deadline=None)
@given(
    scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.inf]), max_size=40),
    taken=st.sets(st.integers(0, 39)),
    count=st.integers(1, 12),
)
def test_rejected_first_is_the_stable_order_of_what_is_left(scores: list[float], taken: set[int], count: int) -> None:
    chosen = np.array([number for number in taken if number < len(scores)], np.int64)
    left = [number for number in range(len(scores)) if number not in taken]
    expected = sorted(left, key=lambda number: (-scores[number], number))[:count]
    assert rejected_first(np.array(scores), chosen, count).tolist() == expected


def test_documents_say_where_they_are_from_and_what_they_are(tmp_path: Path) -> None:
    texts = ["the cat sat on a mat", "rain fell on roofs", "old houses in town"]
    tokenizer = tiny_tokenizer()
    samples = [np.append(ids, 0) for ids in tokenizer.encode_batch(texts)]
    pool = make_pool(tmp_path / "pool", (2, 1), samples=samples)
    found = example_documents(pool, np.array([2, 0]), np.array([-1.5, 0.25]), np.array([1]), np.array([3.0]))
    shards = pool.shard_names
    assert found == {
        "chosen": [
            {
                "row": 2,
                "shard": shards[1],
                "shard_row": 0,
                "score": -1.5,
                "kind": "book",
                "num_tokens": len(samples[2]),
                "text": texts[2],
            },
            {
                "row": 0,
                "shard": shards[0],
                "shard_row": 0,
                "score": 0.25,
                "kind": None,
                "num_tokens": len(samples[0]),
                "text": texts[0],
            },
        ],
        "rejected": [
            {"row": 1, "shard": shards[0], "shard_row": 1, "score": 3.0, "kind": "web", "num_tokens": len(samples[1]), "text": texts[1]}
        ],
    }
    assert json.loads(json.dumps(found)) == found


def test_long_texts_are_cut_and_no_more_than_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny_tokenizer().encode_batch(["wonderful \u4e16\u754c" * 2000])[0]
    pool = make_pool(tmp_path / "pool", (30,), samples=[ids] * 30)
    read, decoded = [], []
    monkeypatch.setattr(PoolReader, "read", lambda self, row: read.append(row) or ids)
    decode = PoolTokenizer.decode
    monkeypatch.setattr(PoolTokenizer, "decode", lambda self, tokens: decoded.append(len(tokens)) or decode(self, tokens))
    found = example_documents(pool, np.arange(20), None, np.arange(20, 30), None)
    assert [len(found[side]) for side in ("chosen", "rejected")] == [10, 10] and read == [*range(10), *range(20, 30)]
    assert all(document["score"] is None for document in found["chosen"])
    text = found["chosen"][0]["text"]
    assert len(text) == examples.MAX_CHARACTERS and text.startswith("wonderful \u4e16\u754cwonderful")
    assert max(decoded) <= 4 * examples.MAX_CHARACTERS < len(ids)


@pytest.mark.parametrize("content", [None, b"{}"])
def test_without_a_tokenizer_the_first_ids_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None) -> None:
    pool = make_pool(tmp_path / "pool", (2,), samples=[np.arange(250), np.arange(7)])
    (tmp_path / "pool" / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "pool" / "tokenizer.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = example_documents(pool, np.array([0, 1]), None, EMPTY, None)
    assert [document["text"] for document in found["chosen"]] == [None, None] and found["rejected"] == []
    assert found["chosen"][0]["tokens"] == list(range(100)) and found["chosen"][1]["tokens"] == list(range(7))
    assert "the example documents are shown as token ids: " in caplog.text


def test_a_damaged_sample_is_left_empty_and_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(tmp_path / "pool", (2, 3), member_format="json.gz")
    shard = pool.shard_path(1)
    with open(shard, "r+b") as file:
        file.seek(int(pool.offsets[3]))
        file.write(b"\0" * int(pool.member_bytes[3]))
    with caplog.at_level(logging.WARNING):
        found = example_documents(pool, np.array([3, 0]), None, EMPTY, None)
    assert found["chosen"][0]["text"] is None and "tokens" not in found["chosen"][0]
    assert isinstance(found["chosen"][1]["text"], str)
    assert "an example document is left empty: " in caplog.text and "row 1" in caplog.text
