"""Existing DCLM token shards as a pool, and the tool that indexes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats import existing
from megatron_groupmates.pool.formats.existing import index_existing
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.utils.storage import join, upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.helpers import make_pool, tiny_tokenizer, tokenizer_json
from tests.pool.tars import json_member, random_samples, raw_member, write_tar

TOOL = Path(__file__).parents[3] / "tools" / "index_pool.py"


def dclm_shard(path: Path, samples: list[list[int]], suffix: str = ".json.gz") -> None:
    """As DCLM's tokeniser writes them, with random member names and a directory entry."""
    write_tar(path, [("inside", None), *((f"{uuid.uuid4()}{suffix}", json_member(sample)) for sample in samples)])


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
        (
            lambda path: dclm_shard(path / "shard_00000001.tar", [[1]], ".txt"),
            r"no member has ids: the names end in \.txt, not in \.json\.gz or \.bin; name the ending with --member-suffix",
        ),
        (lambda path: dclm_shard(path / "shard_00000001.tar", [[]]), "shard_00000001.tar cannot be indexed: row 0: not a JSON list"),
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
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "3 shards, 13 samples, 117 tokens" in done.stdout
    assert "1 shards not listed, left out: shard_00000009" in done.stdout
    os.remove(tmp_path / "shards" / "shard_00000001.tar")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1
    assert "error: 1 of the 3 shards of" in done.stderr and "are missing: shard_00000001" in done.stderr
    assert "Traceback" not in done.stderr


def read_all(pool: Path) -> list[list[int]]:
    index = PoolIndex.open(pool)
    return [tokens.tolist() for tokens in PoolReader(index).read_many(range(index.num_samples))]


def test_raw_shards_of_a_pool_are_a_pool_again(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "made")
    samples = read_all(tmp_path / "made")
    for name in ("pool.json", "index.bin", "tokenizer.json"):
        (tmp_path / "made" / name).unlink()
    index_existing(tmp_path / "made", tmp_path / "pool", tiny_tokenizer())
    assert read_all(tmp_path / "pool") == samples
    again = PoolIndex.open(tmp_path / "pool")
    assert (again.fingerprint, again.member_format) == (index.fingerprint, "raw")
    for name in ("offsets", "member_bytes", "lengths"):
        assert np.array_equal(getattr(again, name), getattr(index, name))


def test_members_beside_the_ids_are_left_out_and_counted(tmp_path: Path) -> None:
    samples = random_samples(4)
    for number in range(2):
        members = []
        for row in range(2):
            key = f"{number}_{row}"
            members += [(f"{key}.json", b"{}"), (f"{key}.tokens.json.gz", json_member(samples[2 * number + row])), (f"{key}.txt", b"x")]
        write_tar(tmp_path / f"{number}.tar", [*members, ("README", b"no dot")])
    report = index_existing(tmp_path, tmp_path, tiny_tokenizer())
    assert read_all(tmp_path) == samples
    assert report.ignored == {"json": 4, "txt": 4, "": 2}


def two_sorts(path: Path, samples: list[list[int]]) -> None:
    members = []
    for row, sample in enumerate(samples):
        members += [(f"{row}.a.json.gz", json_member(sample)), (f"{row}.b.json.gz", json_member(sample[::-1]))]
    write_tar(path, members)


def test_where_several_members_may_hold_ids_the_user_chooses(tmp_path: Path) -> None:
    samples = random_samples(3)
    two_sorts(tmp_path / "shards" / "0.tar", samples)
    with pytest.raises(UserError, match=r"0\.tar cannot be indexed: members end in \.a\.json\.gz and in \.b\.json\.gz.*--member-suffix"):
        index_existing(tmp_path / "shards", tmp_path / "pool", tiny_tokenizer())
    report = index_existing(tmp_path / "shards", tmp_path / "pool", tiny_tokenizer(), member_suffix=".b.json.gz")
    assert read_all(tmp_path / "pool") == [sample[::-1] for sample in samples]
    assert report.ignored == {"a.json.gz": 3}
    with pytest.raises(UserError, match=r"--member-suffix 'npy' should end in json.gz or bin: no other"):
        index_existing(tmp_path / "shards", tmp_path / "other", tiny_tokenizer(), member_suffix="npy")
    with pytest.raises(UserError, match=r"no member has ids: the names end in \.a.*, not in \.c\.bin"):
        index_existing(tmp_path / "shards", tmp_path / "other", tiny_tokenizer(), member_suffix="c.bin")


def test_shards_with_different_members_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.json.gz", json_member([1, 2]))])
    write_tar(tmp_path / "1.tar", [("0.bin", raw_member([1, 2]))])
    with pytest.raises(UserError, match=r"different members: \.bin in 1, \.json\.gz in 0; choose one with --member-suffix"):
        index_existing(tmp_path, tmp_path, tiny_tokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_member([1, 300]), "row 1 has ids from 1 to 300, .* has 300: name"),
        (b"123", "row 1: buffer size must be a multiple"),
        (b"", "row 1: it has no ids"),
    ],
)
def test_damaged_raw_members_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_tar(tmp_path / "0.tar", [("0.bin", raw_member([1, 2])), ("1.bin", content)])
    with pytest.raises(UserError, match=message):
        index_existing(tmp_path, tmp_path, tiny_tokenizer())


def test_names_with_directories(tmp_path: Path) -> None:
    samples = random_samples(4)
    for number, name in enumerate(("a/shard_0", "b/deep/shard_0")):
        write_tar(tmp_path / f"{name}.tar", [(f"x/{row}.json.gz", json_member(samples[2 * number + row])) for row in range(2)])
    index_existing(tmp_path, tmp_path / "pool", tiny_tokenizer())
    assert PoolIndex.open(tmp_path / "pool").shard_names == ["a/shard_0", "b/deep/shard_0"]
    assert read_all(tmp_path / "pool") == samples
    (tmp_path / "manifest.jsonl").write_text('{"shard": "b/deep/shard_0", "num_sequences": 2}')
    report = index_existing(tmp_path, tmp_path / "listed", tiny_tokenizer())
    assert (read_all(tmp_path / "listed"), report.extra) == (samples[2:], ["a/shard_0"])


def test_a_killed_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = dclm_directory(tmp_path / "shards", (4, 7, 2, 3))
    scan, read = existing.scan_shard, []

    def dies_at_the_third(path: str, name: str, options: object) -> object:
        read.append(name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return scan(path, name, options)

    monkeypatch.setattr(existing, "scan_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        index_existing(tmp_path / "shards", tmp_path / "pool", tiny_tokenizer())
    assert read == [f"shard_{number:08d}" for number in range(3)]
    # A shard that was replaced in between is read again.
    dclm_shard(tmp_path / "shards" / "shard_00000000.tar", samples[:4])
    read.clear()
    monkeypatch.setattr(existing, "scan_shard", lambda *arguments: (read.append(arguments[1]), scan(*arguments))[1])
    index_existing(tmp_path / "shards", tmp_path / "pool", tiny_tokenizer())
    assert read == [f"shard_{number:08d}" for number in (0, 2, 3)]
    assert read_all(tmp_path / "pool") == samples
    assert set(snapshot(tmp_path / "pool")) == {"pool.json", "index.bin", "tokenizer.json"}
    index_existing(tmp_path / "shards", tmp_path / "straight", tiny_tokenizer())
    assert snapshot(tmp_path / "straight") == snapshot(tmp_path / "pool")


def test_a_shard_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dclm_directory(tmp_path)
    scan = existing.scan_shard

    def and_change(path: str, name: str, options: object) -> object:
        result = scan(path, name, options)
        if name == "shard_00000001":
            dclm_shard(Path(path), [[1]] * 9)
        return result

    monkeypatch.setattr(existing, "scan_shard", and_change)
    with pytest.raises(UserError, match="shards changed while they were read: shard_00000001; index them when"):
        index_existing(tmp_path, tmp_path / "pool", tiny_tokenizer())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_in_a_store(tmp_path: Path, s3_options: dict, num_workers: int) -> None:  # noqa: F811
    samples = dclm_directory(tmp_path / "local")
    url = f"s3://{BUCKET}/tokenized"
    for path in (tmp_path / "local").iterdir():
        upload(path, join(url, path.name))
    report = index_existing(url, tmp_path / "pool", tiny_tokenizer(), num_workers)
    assert (report.num_shards, report.num_samples) == (3, 13)
    index = PoolIndex.open(tmp_path / "pool")
    assert index.facts["shard_directory"] == url
    assert read_all(tmp_path / "pool") == samples
    index_existing(tmp_path / "local", tmp_path / "of_local", tiny_tokenizer())
    assert PoolIndex.open(tmp_path / "of_local").fingerprint == index.fingerprint
    assert not index_existing(url, tmp_path / "pool", tiny_tokenizer()).built
    with pytest.raises(UserError, match=r"an index cannot be written to s3://data/tokenized; name a local directory with --output"):
        index_existing(url, url, tiny_tokenizer())


def test_tool_with_a_store_and_a_suffix(tmp_path: Path, s3_options: dict) -> None:  # noqa: F811
    two_sorts(tmp_path / "0.tar", random_samples(3))
    upload(tmp_path / "0.tar", f"s3://{BUCKET}/shards/0.tar")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    command = [sys.executable, str(TOOL), "--shards", f"s3://{BUCKET}/shards", "--tokenizer", "tokenizer.json", "--workers", "0"]
    command += ["--output", "pool", "--storage-options", json.dumps(s3_options), "--member-suffix", "a.json.gz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "1 shards, 3 samples, 27 tokens" in done.stdout and "3 members without ids left out: .b.json.gz" in done.stdout
    assert read_all(tmp_path / "pool") == random_samples(3)
    with pytest.raises(UserError, match="--workers -1 should be at least 0"):
        index_existing(tmp_path, tmp_path, tiny_tokenizer(), num_workers=-1)
