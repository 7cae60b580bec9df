"""Shards, the pool index and the reader."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.members import decode_json_member
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.writer import token_dtype, write_shard
from tests.pool.helpers import change_facts, make_pool


def ragged(count: int, vocab_size: int = 300) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, generator.integers(1, 700)) for _ in range(count)]


def test_facts_of_the_index(tmp_path: Path) -> None:
    samples = ragged(16)
    index = make_pool(tmp_path, (5, 8, 3), samples=samples)
    assert index.directory == tmp_path
    assert index.shard_names == ["shard_00000000", "shard_00000001", "shard_00000002"]
    assert index.rows_per_shard.tolist() == [5, 8, 3]
    assert index.first_row.tolist() == [0, 5, 13, 16]
    assert (index.num_samples, index.num_shards) == (16, 3)
    assert index.num_tokens == sum(map(len, samples))
    assert index.lengths.tolist() == list(map(len, samples))
    assert index.lengths.dtype == np.int32 and index.kind_of.dtype == np.int16
    assert index.kinds == ["web", "book"] and set(index.kind_of.tolist()) == {-1, 0, 1}
    assert (index.vocab_size, index.token_dtype, index.eot_id) == (300, "uint16", 0)
    assert set(index.tokenizer) == {"name", "fingerprint"}
    assert (tmp_path / "manifest.jsonl").read_bytes().endswith(b'{"num_sequences":3,"shard":"shard_00000002"}\n')


def test_locate_and_rows_are_inverse(tmp_path: Path) -> None:
    index = make_pool(tmp_path)
    rows = np.arange(index.num_samples)
    shards, rows_in_shard = index.locate(rows)
    assert shards.dtype == rows_in_shard.dtype == np.int64
    assert shards.tolist() == [0] * 5 + [1] * 8 + [2] * 3
    back = [int(index.rows(index.shard_names[shard], row)) for shard, row in zip(shards, rows_in_shard, strict=True)]
    assert back == rows.tolist()
    assert index.rows("shard_00000001", np.array([7, 0])).tolist() == [12, 5]


def test_locate_and_rows_refuse_what_is_not_there(tmp_path: Path) -> None:
    index = make_pool(tmp_path)
    with pytest.raises(IndexError, match=r"pool rows 0 to 16 are not all in range\(16\)"):
        index.locate(np.array([0, 16]))
    with pytest.raises(UserError, match="has no shard 'shard_9'; it has 'shard_00000000' to 'shard_00000002'"):
        index.rows("shard_9", np.array([0]))
    with pytest.raises(IndexError, match="rows 5 to 5 are not all in shard shard_00000000, which has 5"):
        index.rows("shard_00000000", np.array([5]))
    with pytest.raises(IndexError, match=r"pool row 16 is not in range\(16\)"):
        PoolReader(index).read(16)


def test_fingerprint_names_the_content(tmp_path: Path) -> None:
    first = make_pool(tmp_path / "a")
    assert make_pool(tmp_path / "b").fingerprint == first.fingerprint
    assert make_pool(tmp_path / "c", seed=1).fingerprint != first.fingerprint
    assert make_pool(tmp_path / "d", (8, 5, 3)).fingerprint != first.fingerprint


def test_shards_are_plain_deterministic_tars(tmp_path: Path) -> None:
    samples = ragged(3)
    record = write_shard(tmp_path, 4, samples, "uint16")
    content = (tmp_path / "shard_00000004.tar").read_bytes()
    assert len(content) == record.num_bytes and len(content) % tarfile.RECORDSIZE == 0
    assert hashlib.sha256(content).hexdigest() == record.sha256
    with tarfile.open(tmp_path / "shard_00000004.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"00000004_{row:08d}.bin" for row in range(3)]
        assert [member.offset_data for member in members] == record.offsets.tolist()
        assert {(member.mode, member.mtime, member.uid) for member in members} == {(0o644, 0, 0)}
        assert tar.extractfile(members[1]).read() == samples[1].astype("<u2").tobytes()
    assert write_shard(tmp_path / "again", 4, samples, "uint16").sha256 == record.sha256


def test_json_members_are_those_of_dclm(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [np.array([5, 6])], "uint16", "json.gz")
    with tarfile.open(tmp_path / "shard_00000000.tar") as tar:
        member = tar.getmembers()[0]
        assert member.name == "00000000_00000000.json.gz"
        assert decode_json_member(tar.extractfile(member).read()).tolist() == [5, 6]


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    def samples():
        yield np.array([1])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path, 0, samples(), "uint16")
    assert list(tmp_path.iterdir()) == []


def test_narrowest_dtype() -> None:
    assert [token_dtype(size) for size in (2, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def change_text(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def flip_byte(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: os.remove(pool / "shard_00000001.tar"), "1 of 3 shards are missing in .*: shard_00000001.tar; restore them"),
        (
            lambda pool: os.truncate(pool / "shard_00000001.tar", 100),
            "1 shards in .* have another size: shard_00000001.tar has 100 bytes, the index says 10240",
        ),
        (lambda pool: flip_byte(pool / "index.bin"), "index.bin is not the one the pool was made with"),
        (lambda pool: os.truncate(pool / "index.bin", 5), "index.bin has 5 bytes, 16 samples need 288"),
        (lambda pool: os.remove(pool / "index.bin"), "index.bin has 0 bytes"),
        (lambda pool: flip_byte(pool / "tokenizer.json"), "tokenizer.json is not the one the pool was made with"),
        (lambda pool: os.remove(pool / "tokenizer.json"), r"tokenizer.json is not the one .* \(SHA-256 missing"),
        (lambda pool: os.remove(pool / "pool.json"), "is not a pool: it has no pool.json"),
        (lambda pool: (pool / "pool.json").write_text("{"), "pool.json is damaged"),
        (lambda pool: (pool / "pool.json").write_text("[]"), "is not the description of a pool"),
        (lambda pool: change_facts(pool, version=9), "has version 9, this package reads 1"),
        (lambda pool: change_facts(pool, num_samples=0), "is empty: it has no sample"),
        (lambda pool: change_text(pool / "pool.json", '"eot_id": 0', '"eot_id": 1'), "pool.json is damaged: its content has digest"),
        (lambda pool: change_text(pool / "pool.json", '"num_tokens"', '"num_takens"'), "it lacks num_tokens"),
        (lambda pool: (pool / "pool.json").write_text('{"format": "megatron_groupmates pool", "version": 1}'), "it lacks"),
    ],
)
def test_damaged_pools_are_refused(tmp_path: Path, damage, message: str) -> None:
    make_pool(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        PoolIndex.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_all_faults_of_the_shards_are_counted_and_the_first_named(tmp_path: Path) -> None:
    make_pool(tmp_path, (1,) * 30)
    for number in range(12):
        os.remove(tmp_path / f"shard_{number:08d}.tar")
    for number in range(20, 22):
        os.truncate(tmp_path / f"shard_{number:08d}.tar", 1)
    with pytest.raises(UserError) as caught:
        PoolIndex.open(tmp_path)
    missing = ", ".join(f"shard_{number:08d}.tar" for number in range(10))
    resized = ", ".join(f"shard_{number:08d}.tar has 1 bytes, the index says 10240" for number in range(20, 22))
    assert str(caught.value) == (
        f"pool {tmp_path}: 12 of 30 shards are missing in {tmp_path}: {missing} and 2 more; "
        f"2 shards in {tmp_path} have another size: {resized}; restore them or make the pool again"
    )
    assert PoolIndex.open(tmp_path, verify=False).num_samples == 30


def test_tars_that_are_not_in_the_index_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pool(tmp_path, (1,) * 2)
    assert not caplog.records
    write_shard(tmp_path, 7, [np.array([1])], "uint16")
    with caplog.at_level(logging.WARNING):
        assert PoolIndex.open(tmp_path).num_shards == 2
    assert f"1 tars in {tmp_path} are not in its index and will not be read: shard_00000007.tar" in caplog.text


def test_files_of_the_pool(tmp_path: Path) -> None:
    index = make_pool(tmp_path)
    assert index.file_path("index.bin") == tmp_path / "index.bin"
    assert index.file_path("shard_00000000.meta.jsonl.zst") == tmp_path / "shard_00000000.meta.jsonl.zst"
    assert index.shard_path(1) == tmp_path / "shard_00000001.tar"
    assert PoolIndex.open(f"file://{tmp_path}").shard_path(1) == index.shard_path(1)
    assert PoolIndex.open(str(tmp_path)).fingerprint == index.fingerprint


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no pool at .*nowhere: no such directory"):
        PoolIndex.open(tmp_path / "nowhere")


def test_a_pickled_index_maps_the_file_again(tmp_path: Path) -> None:
    index = make_pool(tmp_path, (4000,))
    content = pickle.dumps(index)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).lengths, index.lengths)
