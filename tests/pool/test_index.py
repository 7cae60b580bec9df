"""Shards, the pool index and the reader."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import reader as reader_module
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader, decode_json_member
from megatron_groupmates.pool.writer import token_dtype, write_shard
from tests.pool.helpers import make_pool


def ragged(count: int, vocab_size: int = 300) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, generator.integers(1, 700)) for _ in range(count)]


@pytest.mark.parametrize(("member_format", "vocab_size"), [("raw", 300), ("raw", 100_000), ("json.gz", 300)])
def test_reads_what_was_written(tmp_path: Path, member_format: str, vocab_size: int) -> None:
    samples = ragged(16, vocab_size)
    index = make_pool(tmp_path, samples=samples, member_format=member_format, vocab_size=vocab_size)
    reader = PoolReader(index)
    for row in np.random.default_rng(0).permutation(16):
        tokens = reader.read(int(row))
        assert tokens.dtype == np.int64
        assert np.array_equal(tokens, samples[row])
    many = reader.read_many(np.array([7, 0, 7]))
    assert [tokens.tolist() for tokens in many] == [samples[row].tolist() for row in (7, 0, 7)]


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


def change_facts(directory: Path, **changes: object) -> None:
    path = directory / "pool.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_byte(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: os.remove(pool / "shard_00000001.tar"), "shard .*shard_00000001.tar is missing"),
        (lambda pool: os.truncate(pool / "shard_00000001.tar", 100), "has 100 bytes, the index says 10240"),
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
        (lambda pool: (pool / "pool.json").write_text('{"format": "megatron_groupmates pool", "version": 1}'), "it lacks"),
    ],
)
def test_damaged_pools_are_refused(tmp_path: Path, damage, message: str) -> None:
    make_pool(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        PoolIndex.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no pool at .*nowhere: no such directory"):
        PoolIndex.open(tmp_path / "nowhere")


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
def test_a_damaged_sample_names_shard_and_row(tmp_path: Path, member_format: str) -> None:
    index = make_pool(tmp_path, member_format=member_format)
    reader = PoolReader(index)
    with open(tmp_path / "shard_00000001.tar", "r+b") as file:
        file.seek(int(index.offsets[7]))
        file.write(b"\xff" * int(index.member_bytes[7]))
    with pytest.raises(UserError, match=r"shard_00000001.tar, row 2: cannot read the sample"):
        reader.read(7)
    reader.read(6)
    os.truncate(tmp_path / "shard_00000001.tar", int(index.offsets[9]) + 3)
    with pytest.raises(UserError, match=r"row 4: .* the file ends after 3"):
        reader.read(9)
    os.remove(tmp_path / "shard_00000002.tar")
    with pytest.raises(UserError, match=r"row 0: cannot read the sample: .*No such file"):
        reader.read(13)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"[1.5]", b"[[1]]", b'["a"]', b"[1"])
def test_json_members_must_be_lists_of_ids(content: bytes) -> None:
    with pytest.raises(ValueError):
        decode_json_member(gzip.compress(content))


def test_open_files_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_NUM_OPEN_FILES", 2)
    index = make_pool(tmp_path, (2,) * 6)
    reader = PoolReader(index)
    before = len(os.listdir("/proc/self/fd"))
    for row in np.random.default_rng(0).integers(0, 12, 100):
        reader.read(int(row))
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    reader.read(0)


def read_all(reader: PoolReader, queue) -> None:
    queue.put([tokens.tolist() for tokens in reader.read_many(range(reader.index.num_samples))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_work_in_other_processes(tmp_path: Path, method: str) -> None:
    reader = PoolReader(make_pool(tmp_path))
    expected = [tokens.tolist() for tokens in reader.read_many(range(16))]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=read_all, args=(reader, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60), queue.get(timeout=60)] == [expected, expected]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [tokens.tolist() for tokens in reader.read_many(range(16))] == expected


def test_a_pickled_index_maps_the_file_again(tmp_path: Path) -> None:
    index = make_pool(tmp_path, (4000,))
    content = pickle.dumps(index)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).lengths, index.lengths)
