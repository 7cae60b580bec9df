"""Ids out of samples in every form that other packages hand them over."""

from __future__ import annotations

import io

import numpy as np
import pytest

from megatron_groupmates.pool.formats.tokens import put_tokens
from tests.pool.tars import json_member, raw_member


@pytest.mark.parametrize(
    ("name", "suffix", "content"),
    [
        ("bin", "bin", raw_member([1, 299])),
        (".bin", "bin", io.BytesIO(raw_member([1, 299]))),
        ("x.json.gz", "x.json.gz", json_member([1, 299])),
        ("x.json.gz", "X.json.gz", json_member([1, 299])),
        (".json.gz", "json.gz", io.BytesIO(json_member([1, 299]))),
        ("json.gz", "json.gz", [1, 299]),
    ],
)
def test_every_form(name: str, suffix: str, content: object) -> None:
    sample = put_tokens({"__key__": "k", "json": {"a": 1}, name: content}, suffix, "uint16")
    assert {**sample, "tokens": sample["tokens"].tolist()} == {"__key__": "k", "json": {"a": 1}, "tokens": [1, 299]}
    assert sample["tokens"].dtype == np.int64


def test_wide_ids() -> None:
    content = np.array([70000, 1], dtype="<u4").tobytes()
    assert put_tokens({"bin": content}, "bin", "uint32")["tokens"].tolist() == [70000, 1]


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"sample 'k' has no member \.bin, only __key__, other\.bin"):
        put_tokens({"__key__": "k", "other.bin": b"12"}, "bin", "uint16")
    with pytest.raises(ValueError, match="not a gzip file"):
        put_tokens({"json.gz": b"12"}, "json.gz", "uint16")
