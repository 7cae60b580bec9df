"""Verification finds every damaged byte, and says where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool.index import MEMBER_FORMATS, PoolIndex
from megatron_groupmates.pool.verification import verify_pool
from megatron_groupmates.utils.storage import join, upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.helpers import change_facts, make_pool


def verify(pool: Path | str, num_workers: int = 0) -> list[str]:
    return verify_pool(PoolIndex.open(pool, verify=False), num_workers)


@pytest.mark.parametrize("member_format", MEMBER_FORMATS)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, member_format: str, data: st.DataObject) -> None:
    pool = tmp_path_factory.mktemp("pool")
    make_pool(pool, (3, 2), member_format=member_format)
    assert verify(pool) == []
    path = pool / data.draw(st.sampled_from(["shard_00000000.tar", "shard_00000001.tar", "tokenizer.json"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    damage = verify(pool)
    assert damage and all(path.name in line for line in damage)
    assert "SHA-256" in damage[0]


def change(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_that_is_damaged_is_listed(tmp_path: Path, num_workers: int) -> None:
    index = make_pool(tmp_path, (3, 3, 3, 3), member_format="json.gz")
    change(tmp_path / "shard_00000000.tar", int(index.offsets[1]) + 12)
    os.remove(tmp_path / "shard_00000001.tar")
    os.truncate(tmp_path / "shard_00000002.tar", int(index.offsets[7]))
    damage = verify(tmp_path, num_workers)
    expected = [
        ("shard_00000000.tar", "SHA-256"),
        ("shard_00000000.tar", "row 1: "),
        ("shard_00000001.tar", "cannot be read: "),
        ("shard_00000002.tar", f"{int(index.offsets[7])} bytes, the index says 10240"),
        ("shard_00000002.tar", "unexpected end of data"),
        ("shard_00000002.tar", "2 samples are not where the index says: rows 1, 2"),
    ]
    assert len(damage) == len(expected)
    for line, (name, what) in zip(damage, expected, strict=True):
        assert line.startswith(f"{tmp_path / name}: {what}"), line


def test_an_index_that_says_otherwise(tmp_path: Path) -> None:
    """Shards whose digests are right, an index that is of other ones."""
    index = make_pool(tmp_path, (8,))
    content = bytearray((tmp_path / "index.bin").read_bytes())
    lengths = 8 * 12
    for row in range(7):
        content[lengths + 4 * row] = 4
    content[8 * 8] = 4  # bytes of row 0
    (tmp_path / "index.bin").write_bytes(content)
    damage = verify(tmp_path)
    assert damage[0].startswith("index.bin: SHA-256 ") and damage[0].endswith(f"pool.json says {index.facts['index_sha256']}")
    shard = f"{tmp_path / 'shard_00000000.tar'}: "
    assert damage[1] == f"{shard}row 0: 18 bytes, the index says 4"
    assert damage[2].startswith(f"{shard}row 1: ")
    assert damage[-1] == f"{shard}and 2 more rows" and len(damage) == 7


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    make_pool(tmp_path, (2,), vocab_size=300)
    change_facts(tmp_path, vocab_size=2)
    damage = verify(tmp_path)
    assert len(damage) == 2 and all("token ids from" in line and "the vocabulary has 2" in line for line in damage)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    make_pool(tmp_path, (2,))
    (tmp_path / "tokenizer.json").unlink()
    (line,) = verify(tmp_path)
    assert line.startswith("tokenizer.json: SHA-256 missing, pool.json says ")


def test_a_pool_in_a_store(tmp_path: Path, s3_options: dict) -> None:  # noqa: F811
    make_pool(tmp_path / "pool", (2, 2))
    change(tmp_path / "pool" / "shard_00000001.tar", 700)
    url = f"s3://{BUCKET}/pool"
    for path in (tmp_path / "pool").iterdir():
        upload(path, join(url, path.name))
    damage = verify(url)
    assert damage and all(line.startswith(f"{url}/shard_00000001.tar: ") for line in damage)
