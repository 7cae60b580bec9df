"""Reading samples from local shards: equal to what was written, and errors that name the sample."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import reader as reader_module
from megatron_groupmates.pool import shards as shards_module
from megatron_groupmates.pool.members import decode_json_member, decode_json_members, parse_id_list
from megatron_groupmates.pool.reader import DamagedSample, PoolReader
from megatron_groupmates.pool.shards import join_ranges
from tests.pool.helpers import make_pool


def ragged(count: int, vocab_size: int = 300) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, generator.integers(1, 700)) for _ in range(count)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_RETRY_SECONDS", (0.0,) * 3)


FORMATS = [("raw", 300), ("raw", 100_000), ("json.gz", 300)]


@pytest.mark.parametrize(("member_format", "vocab_size"), FORMATS)
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
    assert reader.read_many([]) == []


@pytest.mark.parametrize(("member_format", "vocab_size"), FORMATS)
@pytest.mark.parametrize("batch_bytes", [1, 50, 1 << 20])
def test_batches_equal_single_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member_format: str, vocab_size: int, batch_bytes: int
) -> None:
    samples = [np.random.default_rng(seed).integers(0, vocab_size, 40) for seed in range(60)]
    index = make_pool(tmp_path, (30, 1, 29), samples=samples, member_format=member_format, vocab_size=vocab_size)
    monkeypatch.setattr(shards_module.LocalShards, "batch_bytes", batch_bytes)
    monkeypatch.setattr(shards_module, "_MAX_RANGE_BYTES", 3000)
    reader, generator = PoolReader(index), np.random.default_rng(0)
    for rows in (np.arange(60), generator.permutation(60), generator.integers(0, 60, 100), np.array([59]), [30, 30, 0]):
        batch = reader.read_batch(rows)
        assert batch.dtype == np.int64 and batch.shape == (len(rows), 40)
        assert np.array_equal(batch, np.stack([samples[row] for row in rows]))
    assert reader.read_batch([]).shape == (0, 0)


def test_a_batch_needs_one_length(tmp_path: Path) -> None:
    reader = PoolReader(make_pool(tmp_path, samples=ragged(16)))
    with pytest.raises(UserError, match=r"samples of \d+ and \d+ tokens do not make a batch"):
        reader.read_batch([0, 1, 2])


@pytest.mark.parametrize("row", [-1, 16])
def test_rows_outside_the_pool(tmp_path: Path, row: int) -> None:
    reader = PoolReader(make_pool(tmp_path))
    for read in (reader.read_batch, reader.read_many):
        with pytest.raises(IndexError, match=rf"pool row {row} is not in range\(16\)"):
            read([3, row])


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_ranges_cover_their_members(data: st.DataObject) -> None:
    """Every member lies whole in its range, ranges are no longer than they may be and gaps are not read over."""
    number = data.draw(st.integers(0, 30))
    shards = sorted(data.draw(st.lists(st.integers(0, 3), min_size=number, max_size=number)))
    gaps = data.draw(st.lists(st.integers(0, 40), min_size=number, max_size=number))
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=number, max_size=number))
    starts = (np.cumsum(np.add(gaps, sizes)) - sizes).astype(int).tolist()
    max_gap, max_bytes = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 100))
    ranges, places = join_ranges(shards, starts, sizes, max_gap, max_bytes)
    files = [np.random.default_rng(shard).integers(0, 256, 3000).astype(np.uint8).tobytes() for shard in range(4)]
    content = b"".join(files[shard][start:stop] for shard, start, stop in ranges)
    assert len(places) == number
    for shard, start, size, place in zip(shards, starts, sizes, places, strict=True):
        assert content[place : place + size] == files[shard][start : start + size]
    for shard, start, stop in ranges:
        inside = [
            number for number, (other, first) in enumerate(zip(shards, starts, strict=True)) if other == shard and start <= first < stop
        ]
        assert stop - start <= max(max_bytes, 30)
        assert stop - start - sum(sizes[number] for number in inside) <= max_gap * (len(inside) - 1)


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_damaged_sample_names_shard_and_row(tmp_path: Path, member_format: str, batched: bool) -> None:
    index = make_pool(tmp_path, member_format=member_format)
    reader = PoolReader(index)

    def read(row: int) -> object:
        return reader.read_batch([12, row, 6]) if batched and row < 9 else reader.read(row)

    with open(tmp_path / "shard_00000001.tar", "r+b") as file:
        file.seek(int(index.offsets[7]))
        file.write(b"\xff" * int(index.member_bytes[7]))
    with pytest.raises(DamagedSample, match=r"shard_00000001.tar, row 2: cannot read the sample: .*; restore the shard") as caught:
        read(7)
    assert (caught.value.row, caught.value.shard_name, caught.value.row_in_shard) == (7, "shard_00000001", 2)
    read(6)
    os.truncate(tmp_path / "shard_00000001.tar", int(index.offsets[9]) + 3)
    with pytest.raises(DamagedSample, match=r"row 4: .* the file ends after 3"):
        read(9)
    os.remove(tmp_path / "shard_00000002.tar")
    with pytest.raises(DamagedSample, match=r"row 0: cannot read the sample: .*No such file"):
        read(13)


def test_a_damaged_sample_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedSample("text", 7, "shard", 2)))
    assert isinstance(error, UserError) and str(error) == "text"
    assert (error.row, error.shard_name, error.row_in_shard) == (7, "shard", 2)
    assert str(DamagedSample("only text")) == "only text"


def test_a_sample_of_another_length_is_refused(tmp_path: Path) -> None:
    index = make_pool(tmp_path, member_format="json.gz")
    index.lengths = index.lengths.copy()
    index.lengths[4] = 8
    with pytest.raises(DamagedSample, match=r"row 4: .* 8 tokens expected, found 9"):
        PoolReader(index).read_many([3, 4])
    raw = make_pool(tmp_path / "raw")
    raw.lengths = index.lengths
    with pytest.raises(DamagedSample, match=r"row 4: .* 8 tokens expected, found 9"):
        PoolReader(raw).read(4)


class Faults:
    """``os.pread`` that fails as often as told, then works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
        self.pread, self.times, self.code, self.calls = os.pread, times, code, 0
        monkeypatch.setattr(os, "pread", self)

    def __call__(self, descriptor: int, length: int, offset: int) -> bytes:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.code, os.strerror(self.code))
        return self.pread(descriptor, length, offset)


def test_a_read_that_was_refused_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reader = PoolReader(make_pool(tmp_path))
    expected = reader.read(7)
    faults = Faults(monkeypatch, errno.ESTALE, times=4)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(reader.read(7), expected)
    assert faults.calls == 5
    assert caplog.text.count("Stale file handle; trying again") == 3


def test_reads_refused_for_good_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = PoolReader(make_pool(tmp_path))
    faults = Faults(monkeypatch, errno.EIO, times=100)
    with pytest.raises(DamagedSample, match=r"shard_00000001.tar, row 2: .*Input/output error; check the disk"):
        reader.read(7)
    assert faults.calls == 5  # the batch, then the sample: once and after each wait


def test_a_glitch_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = PoolReader(make_pool(tmp_path))
    expected, pread, calls = reader.read(7), os.pread, []

    def glitch(descriptor: int, length: int, offset: int) -> bytes:
        calls.append(offset)
        content = pread(descriptor, length, offset)
        return b"\xff" * len(content) if len(calls) <= 2 else content

    monkeypatch.setattr(os, "pread", glitch)
    assert np.array_equal(reader.read(7), expected)
    assert len(calls) == 3


def json_text(tokens: list[int]) -> bytes:
    return json.dumps(tokens).encode()


@given(st.lists(st.integers(0, 99_999_999), min_size=1, max_size=50))
@settings(deadline=None)
def test_fast_parsing_is_exact(tokens: list[int]) -> None:
    found = parse_id_list(json_text(tokens))
    assert found is not None and found.dtype == np.int64
    assert found.tolist() == tokens


@given(st.one_of(st.text("0123456789, []-", max_size=20), st.lists(st.sampled_from(["[", "]", "0", "17", ", ", ",", " "]), max_size=12)))
@settings(deadline=None, max_examples=1000)
def test_fast_parsing_takes_nothing_else(parts: str | list[str]) -> None:
    """Whatever it accepts, ``json.loads`` reads as the same."""
    text = "".join(parts).encode()
    found = parse_id_list(text)
    if found is not None:
        assert json.loads(text) == found.tolist()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.data())
@settings(deadline=None, max_examples=500)
def test_one_wrong_character_is_noticed(tokens: list[int], data: st.DataObject) -> None:
    text = bytearray(json_text(tokens))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    found = parse_id_list(bytes(text))
    if found is not None:
        assert json.loads(bytes(text)) == found.tolist()


@pytest.mark.parametrize("text", [b"[1,2]", b"[ 1, 2 ]", b"[1,\n2]\n", b"[123456789, 4000000000]", b"[-1, 2]", b"[0, 0]"])
def test_other_forms_of_json_are_read_too(text: bytes) -> None:
    assert decode_json_member(gzip.compress(text)).tolist() == json.loads(text)


@pytest.mark.parametrize(
    "content",
    [
        *(b"{}", b"[]", b"[1.5]", b"[[1]]", b'["a"]', b"[1", b"[01]", b"[1, 007]", b"[true]", b"[1, true]", b"", b"1"),
        *(b"[1, , 2]", b"[99999999999999999999]", b"[" * 100_000, b"\xff", b"[1 2, 3]", b"[, 1]", b"[1, ]", b"[1,"),
    ],
)
def test_json_members_must_be_lists_of_ids(content: bytes) -> None:
    with pytest.raises(ValueError):
        decode_json_member(gzip.compress(content))
    with pytest.raises(ValueError):
        decode_json_members([gzip.compress(b"[1, 2]"), gzip.compress(content), gzip.compress(b"[3]")])


@given(st.lists(st.tuples(st.lists(st.integers(0, 10**9), min_size=1, max_size=9), st.booleans()), min_size=1, max_size=40))
@settings(deadline=None)
def test_members_decoded_together_equal_single_ones(members: list[tuple[list[int], bool]]) -> None:
    texts = [json.dumps(tokens, separators=(",", ":") if compact else None).encode() for tokens, compact in members]
    tokens, lengths = decode_json_members([gzip.compress(text) for text in texts])
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [token for tokens, _ in members for token in tokens]
    assert lengths == [len(tokens) for tokens, _ in members]


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 20), slice(0, -4), slice(1, None)])
def test_damaged_gzip_is_a_value_error(cut: slice) -> None:
    with pytest.raises(ValueError):
        decode_json_member(gzip.compress(json_text(list(range(500))))[cut])


def test_open_files_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN_FILES", 2)
    index = make_pool(tmp_path, (2,) * 6)
    reader = PoolReader(index)
    before = len(os.listdir("/proc/self/fd"))
    for row in np.random.default_rng(0).integers(0, 12, 100):
        reader.read(int(row))
    reader.read_batch(range(12))
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    reader.read(0)


def read_all(reader: PoolReader, queue: multiprocessing.Queue) -> None:
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
    assert [queue.get(timeout=500), queue.get(timeout=500)] == [expected, expected]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [tokens.tolist() for tokens in reader.read_many(range(16))] == expected
