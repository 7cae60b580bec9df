"""Damaged files, thousands of them: every reader gives a clear error or what the undamaged file holds.

What is guaranteed, and tested here:

- ``pool.json``, ``index.bin``, ``tokenizer.json``, ``generation.json``, ``rows.bin`` have digests: nothing but the original
  content is ever taken for them.
- ``.json.gz`` members have checksums: a reader gives a sample of the pool as it was written, or an error. That it is the
  sample of this very row is told by the shard's SHA-256 alone (``--verify``), as where members have changed places.
- Raw members have none: their number of ids and the range of the ids hold, the rest is told by ``--verify``.
- Raw documents and the lists of shards have none either: a line is a document or a reject, the same in every pass.
- The log and the pointer have none, but what they name has: an entry names a generation's digest.
- Errors name the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import reader as reader_module
from megatron_groupmates.pool.exclusion import load_exclusion, write_exclusion
from megatron_groupmates.pool.formats.existing import index_existing
from megatron_groupmates.pool.generation import load_generation, publish, read_pointer, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry, read_log
from megatron_groupmates.pool.preprocess.records import Document, DocumentFile, Reject, find_inputs
from megatron_groupmates.pool.reader import DamagedSample, PoolReader
from megatron_groupmates.pool.skips import Skip, append_skip, read_skips
from megatron_groupmates.pool.sources import read_sources, sources_path, write_sources
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.verification import verify_pool
from tests.pool.damage import damaged, flip, replace
from tests.pool.helpers import documents, make_pool, tiny_tokenizer, write_raw

CASES = 150
SECONDS = 10.0  # of processor time: no case may take longer


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_RETRY_SECONDS", ())
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def cases(path: Path, count: int = CASES, others: tuple[bytes, ...] = ()) -> Iterator[bytes]:
    """Damage the file at ``path`` in many ways, one after the other, and put it right at the end; yields what it holds."""
    content = path.read_bytes()
    try:
        for number in range(count):
            generator = np.random.default_rng([number, len(content)])
            wrong = damaged(content, generator, others)
            path.write_bytes(wrong)
            started = time.process_time()
            yield wrong
            assert time.process_time() - started < SECONDS, f"case {number} takes too long"
    finally:
        path.write_bytes(content)


def attempt(read: Callable[[], Any], name: str | Path) -> Any:
    """What ``read`` gives, None where it refuses; a refusal names the file (or the directory it lies in)."""
    try:
        return read()
    except (UserError, OSError) as error:
        assert str(name) in str(error), f"the error does not say which file: {error}"
        return None


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_raw_documents(tmp_path: Path, suffix: str) -> None:
    path = write_raw(tmp_path / f"raw.{suffix}", documents(40))
    whole = {document.text for document in read_documents(path)}
    other = write_raw(tmp_path / "other.jsonl", documents(5)).read_bytes()
    for wrong in cases(path, others=(other, b"")):
        found = read_documents(path)
        assert all(type(item) in (Document, Reject) for item in found)
        lines = [item.line for item in found]
        assert lines == sorted(set(lines)), "a line is told twice or out of order"
        assert [dataclasses.astuple(item) for item in read_documents(path)] == [dataclasses.astuple(item) for item in found]
        if suffix == "jsonl":
            assert len(found) <= wrong.count(b"\n") + 1
        elif not any(isinstance(item, Reject) for item in found) and suffix == "jsonl.gz":
            # The checksum of the only member holds, or the file is another one.
            assert {item.text for item in found} <= whole | {document.text for document in read_documents(tmp_path / "other.jsonl")}


def read_documents(path: Path) -> list[Any]:
    (file,) = find_inputs([path])[0]
    return list(DocumentFile(file))


def read_row(reader: PoolReader, row: int) -> tuple[int, ...]:
    return tuple(reader.read(row).tolist())


def samples_of(index: PoolIndex) -> list[tuple[int, ...]]:
    return [tuple(tokens.tolist()) for tokens in PoolReader(index).read_many(range(index.num_samples))]


@pytest.mark.parametrize("name", ["shard_00000001.tar", "manifest.jsonl", "tokenizer.json"])
def test_shards_to_be_indexed(tmp_path: Path, name: str) -> None:
    source = tmp_path / "shards"
    index = make_pool(source, (4, 6, 3), member_format="json.gz")
    originals = set(samples_of(index))
    for facts in ("pool.json", "index.bin"):
        (source / facts).unlink()
    tokenizer = tiny_tokenizer()
    others = ((source / "shard_00000000.tar").read_bytes(), b"", b"[]")
    for _ in cases(source / name, CASES, others):
        output = tmp_path / "pool"
        report = attempt(lambda: index_existing(source, tmp_path / "pool", tokenizer), source)
        if report is not None:
            found = samples_of(PoolIndex.open(output))
            assert len(found) == report.num_samples and set(found) <= originals
        shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("name", ["pool.json", "index.bin", "tokenizer.json"])
def test_descriptions_of_pools(tmp_path: Path, name: str) -> None:
    """Nothing but what was written is ever taken; a side file that is not read changes nothing."""
    index = make_pool(tmp_path / "pool", (4, 6, 3))
    originals, described = samples_of(index), json.loads((tmp_path / "pool/pool.json").read_text())
    make_pool(tmp_path / "other", (4, 6, 3), seed=1)
    others = ((tmp_path / "other" / name).read_bytes(), b"", b"{}")
    for _ in cases(tmp_path / "pool" / name, 400, others):
        opened = attempt(lambda: PoolIndex.open(tmp_path / "pool"), tmp_path / "pool")
        if opened is not None and opened.fingerprint == index.fingerprint:
            assert opened.facts == {**described, "shard_directory": opened.facts["shard_directory"]}
            assert samples_of(opened) == originals
        elif opened is not None:
            assert (tmp_path / "pool" / name).read_bytes() in others, "damage is taken for another pool"


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
def test_shards_damaged_after_the_pool_was_opened(tmp_path: Path, member_format: str) -> None:
    index = make_pool(tmp_path, (5, 4), member_format=member_format)
    originals = samples_of(index)
    path = tmp_path / "shard_00000000.tar"
    content = path.read_bytes()
    for wrong in cases(path, 300, ((tmp_path / "shard_00000001.tar").read_bytes(),)):
        reader = PoolReader(index)
        for row in range(index.num_samples):
            tokens = attempt(functools.partial(read_row, reader, row), path)
            if member_format == "json.gz":
                assert tokens is None or tokens in originals
            elif tokens is not None:
                assert len(tokens) == index.lengths[row] and 0 <= min(tokens) <= max(tokens) < index.vocab_size
            assert row < 5 or tokens == originals[row], "damage to one shard reaches another"
        if wrong != content:
            assert any(str(path) in line for line in verify_pool(index)), "what reading cannot see, verification does"
            if len(wrong) != len(content):
                assert attempt(lambda: PoolIndex.open(tmp_path), path.name) is None


def test_flipped_bits_in_members_with_checksums_are_always_seen(tmp_path: Path) -> None:
    """Without a block moved as a whole, a row is what it was or an error."""
    index = make_pool(tmp_path, (6,), member_format="json.gz")
    originals, path = samples_of(index), tmp_path / "shard_00000000.tar"
    content, refused = path.read_bytes(), 0
    for number in range(CASES):
        generator = np.random.default_rng(number)
        victim = int(generator.integers(0, 6))
        start, stop = int(index.offsets[victim]), int(index.offsets[victim]) + int(index.member_bytes[victim])
        member = (flip, replace)[number % 2](bytearray(content[start:stop]), generator)
        path.write_bytes(content[:start] + bytes(member) + content[stop:])
        reader = PoolReader(index)
        for row in range(6):
            try:
                assert tuple(reader.read(row).tolist()) == originals[row]
            except DamagedSample as error:
                assert f"{path}, row {row}: cannot read the sample" in str(error)
                refused += 1
    assert refused > CASES // 2


def test_sources_of_samples(tmp_path: Path) -> None:
    index = make_pool(tmp_path, (40,))
    name = index.shard_names[0]
    path = sources_path(tmp_path, name)
    write_sources(tmp_path, name, [{"kind": "web", "documents": [{"file": f"{row}.jsonl", "line": row}]} for row in range(40)])
    for _ in cases(path, 300, (b"", b"rubbish")):
        found = attempt(lambda: list(read_sources(index, name)), path)
        assert found is None or (len(found) == 40 and all(isinstance(source, dict) for source in found))


@pytest.mark.parametrize("name", ["generation.json", "rows.bin"])
def test_generations(tmp_path: Path, name: str) -> None:
    index = make_pool(tmp_path / "pool", (9, 1, 8))
    path = write_generation(tmp_path, 3, index, np.arange(0, 18, 2), {"tag": "global_step40"})
    mask = load_generation(tmp_path, 3, index).mask
    other = write_generation(tmp_path, 4, index, np.arange(0, 18, 3), {})
    for wrong in cases(path / name, 500, ((other / name).read_bytes(), b"", b"{}", b"[]")):
        loaded = attempt(lambda: load_generation(tmp_path, 3, index), path)
        if loaded is not None:
            assert np.array_equal(loaded.mask, mask)
            assert name == "generation.json" or wrong == np.packbits(mask).tobytes() or len(wrong) == 4


def test_exclusions(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", (9, 4))
    path = tmp_path / "exclude.json"
    write_exclusion(path, index, np.array([1, 5, 11]), {})
    for _ in cases(path, 300, (b"", b"{}", b"[]")):
        found = attempt(lambda: load_exclusion(path, index), path)
        assert found is None or np.flatnonzero(found.mask).tolist() == [1, 5, 11]


def test_pointers(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", (9,))
    for number in (0, 12):
        write_generation(tmp_path, number, index, None, {})
        publish(tmp_path, number)
    for wrong in cases(tmp_path / "latest", 300, (b"", b"generation-000000\n")):
        number = attempt(lambda: read_pointer(tmp_path), tmp_path / "latest")
        assert number is None or wrong.decode().strip() == f"generation-{number:06d}"


def test_logs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    entries = (LogEntry(0, 0, 0, "a"), LogEntry(1, 40, 0, "b"), LogEntry(1, 90, 1, "b"), LogEntry(2, 120, 1, "c"))
    for entry in entries:
        append_entry(path, entry)
    for wrong in cases(path, 500, (b"", b"{}\n")):
        found = attempt(lambda: read_log(path), path)
        if found is not None:
            assert len(found) <= wrong.count(b"\n")
            assert all(type(entry.generation) is type(entry.effective_sample) is type(entry.epoch) is int for entry in found)


def test_records_of_skipped_samples(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    for sample in range(4):
        append_skip(path, Skip(sample, "shard_00000000", sample, "damaged"))
    for wrong in cases(path, 300, (b"", b"{}\n")):
        found = attempt(lambda: read_skips(path), path)
        assert found is None or (len(found) <= wrong.count(b"\n") and all(isinstance(skip, Skip) for skip in found))


def test_tokenizers(tmp_path: Path) -> None:
    content = tiny_tokenizer().content
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for _ in cases(path, 100, (b"", b"{}")):
        attempt(lambda: PoolTokenizer.load(str(path)), path)
