"""Existing DCLM token shards as a pool, and the tool that indexes them."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.existing import index_existing
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from tests.pool.helpers import tiny_tokenizer, tokenizer_json

TOOL = Path(__file__).parents[2] / "tools" / "index_pool.py"


def dclm_shard(path: Path, samples: list[list[int]], suffix: str = ".json.gz") -> None:
    """As DCLM's tokeniser writes them, with random member names and a directory entry."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        directory = tarfile.TarInfo("inside")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for sample in samples:
            content = gzip.compress(json.dumps(sample).encode())
            info = tarfile.TarInfo(f"{uuid.uuid4()}{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def dclm_directory(
    directory: Path, counts: tuple[int, ...] = (4, 7, 2), final_newline: bool = False, key: str = "num_sequences"
) -> list[list[int]]:
    """Shards and a manifest in completion order; returns the samples in shard order."""
    directory.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    samples, lines = [], []
    for number, count in enumerate(counts):
        here = generator.integers(0, 300, (count, 9)).tolist()
        dclm_shard(directory / f"shard_{number:08d}.tar", here)
        samples += here
        lines.append(json.dumps({key: count, "shard": f"shard_{number:08d}"}))
    (directory / "manifest.jsonl").write_text("\n".join(reversed(lines)) + "\n" * final_newline)
    return samples


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("final_newline", [False, True])
@pytest.mark.parametrize("key", ["num_sequences", "num_chunks"])
def test_shards_become_a_pool_untouched(tmp_path: Path, final_newline: bool, key: str) -> None:
    shards = tmp_path / "shards"
    samples = dclm_directory(shards, final_newline=final_newline, key=key)
    before = snapshot(shards)
    report = index_existing(shards, shards, tiny_tokenizer())
    assert (report.num_shards, report.num_samples, report.num_tokens, report.built) == (3, 13, 117, True)
    assert (report.extra, report.repeated, report.empty) == ([], [], [])
    index = PoolIndex.open(shards)
    assert [tokens.tolist() for tokens in PoolReader(index).read_many(range(13))] == samples
    assert (index.member_format, index.kinds, set(index.kind_of.tolist())) == ("json.gz", [], {-1})
    after = snapshot(shards)
    assert set(after) - set(before) == {"pool.json", "index.bin", "tokenizer.json"}
    assert {name: after[name] for name in before} == before


def test_index_elsewhere_and_with_workers(tmp_path: Path) -> None:
    samples = dclm_directory(tmp_path / "shards")
    before = snapshot(tmp_path / "shards")
    index_existing(tmp_path / "shards", tmp_path / "pool", tiny_tokenizer(), num_workers=2)
    index = PoolIndex.open(tmp_path / "pool")
    assert [tokens.tolist() for tokens in PoolReader(index).read_many(range(13))] == samples
    assert snapshot(tmp_path / "shards") == before
    index_existing(tmp_path / "shards", tmp_path / "again", tiny_tokenizer())
    assert PoolIndex.open(tmp_path / "again").fingerprint == index.fingerprint


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    dclm_directory(tmp_path)
    index_existing(tmp_path, tmp_path, tiny_tokenizer())
    before = snapshot(tmp_path)
    report = index_existing(tmp_path, tmp_path, tiny_tokenizer())
    assert (report.built, report.num_samples) == (False, 13)
    assert snapshot(tmp_path) == before


def test_a_pool_of_something_else_is_refused(tmp_path: Path) -> None:
    dclm_directory(tmp_path / "a")
    dclm_directory(tmp_path / "b")
    index_existing(tmp_path / "a", tmp_path / "pool", tiny_tokenizer())
    with pytest.raises(UserError, match=r"pool is a pool already, with its shards in .*/a, not .*/b"):
        index_existing(tmp_path / "b", tmp_path / "pool", tiny_tokenizer())
    other = tiny_tokenizer()
    other.fingerprint = "other"
    with pytest.raises(UserError, match=r"a pool already, with tokenizer tiny .*, not tiny \(other\)"):
        index_existing(tmp_path / "a", tmp_path / "pool", other)


def test_what_the_manifest_does_not_say(tmp_path: Path) -> None:
    dclm_directory(tmp_path, (4, 0, 2))
    dclm_shard(tmp_path / "shard_00000009.tar", [[1, 2]])
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write('\n\n{"num_sequences": 4, "shard": "shard_00000000"}')
    report = index_existing(tmp_path, tmp_path, tiny_tokenizer())
    assert report.extra == ["shard_00000009"]
    assert report.repeated == ["shard_00000000"]
    assert report.empty == ["shard_00000001"]
    assert PoolIndex.open(tmp_path).shard_names == ["shard_00000000", "shard_00000002"]


def test_without_a_manifest_all_tars_count(tmp_path: Path) -> None:
    dclm_directory(tmp_path)
    (tmp_path / "manifest.jsonl").unlink()
    assert index_existing(tmp_path, tmp_path, tiny_tokenizer()).num_shards == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.remove(path / "shard_00000001.tar"), "1 of the 3 shards of .* are missing: shard_00000001; fetch"),
        (lambda path: dclm_shard(path / "shard_00000001.tar", [[1]] * 6), "has 6 samples, the manifest says 7"),
        (lambda path: dclm_shard(path / "shard_00000001.tar", [[1, 300]]), "row 0 has ids from 1 to 300, .* has 300: name"),
        (lambda path: dclm_shard(path / "shard_00000001.tar", [[1]], ".txt"), "txt' is not a .json.gz of token ids"),
        (lambda path: os.truncate(path / "shard_00000001.tar", 3000), "cannot be indexed: the archive is damaged or ends"),
        (lambda path: os.truncate(path / "shard_00000001.tar", 2100), "cannot be indexed: unexpected end of data"),
        (lambda path: (path / "shard_00000001.tar").write_bytes(b"x" * 3000), "shard_00000001.tar cannot be indexed"),
        (lambda path: (path / "manifest.jsonl").write_text("{}"), "manifest.jsonl, line 1 is not an object with"),
        (lambda path: (path / "manifest.jsonl").write_text("no"), "manifest.jsonl, line 1 is not an object with"),
        (lambda path: (path / "manifest.jsonl").write_text(""), "has no token shards"),
        (lambda path: dclm_directory(path, (0, 0, 0)), "the shards in .* have no sample"),
    ],
)
def test_damaged_shards_are_refused(tmp_path: Path, damage, message: str) -> None:
    dclm_directory(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        index_existing(tmp_path, tmp_path, tiny_tokenizer())
    assert not (tmp_path / "pool.json").exists()


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no directory .*/nowhere"):
        index_existing(tmp_path / "nowhere", tmp_path / "pool", tiny_tokenizer())


def test_tool(tmp_path: Path) -> None:
    dclm_directory(tmp_path / "shards")
    dclm_shard(tmp_path / "shards" / "shard_00000009.tar", [[1, 2]])
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    command = [sys.executable, str(TOOL), "--shards", "shards", "--tokenizer", "tokenizer.json", "--workers", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "3 shards, 13 samples, 117 tokens" in done.stdout
    assert "1 shards not in the manifest, left out: shard_00000009" in done.stdout
    os.remove(tmp_path / "shards" / "shard_00000001.tar")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: pool" in done.stderr and "is missing" in done.stderr and "Traceback" not in done.stderr
