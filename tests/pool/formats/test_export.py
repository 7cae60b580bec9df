"""Which samples are exported, into which directory, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.export import FORMATS, ExportOptions, export_pool
from megatron_groupmates.pool.formats.subset import open_subset, parse_generation
from megatron_groupmates.pool.generation import load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.storage import find_files, join, upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.formats.helpers import MASK, ROWS_PER_SHARD, pool_and_generation, read_json, selected_tokens, snapshot, subset, whole

TOOL = Path(__file__).parents[3] / "tools" / "export_pool.py"


def options(kind: str, **more: object) -> ExportOptions:
    return ExportOptions(kind=kind, **more)


def test_ways_to_name_a_generation(tmp_path: Path) -> None:
    pool, selection = pool_and_generation(tmp_path)
    for name in (selection, f"{selection}/", f"{selection}:2", selection / "generation-000002", f"{selection}/generation-000002/"):
        chosen = open_subset(pool, name)
        assert np.array_equal(chosen.mask, MASK)
        assert chosen.source["generation"] == "generation-000002"
    assert open_subset(pool, None).num_samples == 16
    assert parse_generation("generation-000007") == (Path("."), 7)
    with pytest.raises(UserError, match=r"pool names no generation: no generation-000003, no DIRECTORY:3, nor"):
        parse_generation(pool)
    with pytest.raises(UserError, match="there is no generation 5"):
        open_subset(pool, f"{selection}:5")


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_kind_says_what_it_is_of_and_leaves_the_pool_alone(tmp_path: Path, kind: str, materialize: bool) -> None:
    mask = MASK if materialize else np.repeat([True, False, True], ROWS_PER_SHARD)
    pool, selection = pool_and_generation(tmp_path, mask, member_format="raw" if materialize else "json.gz")
    before = snapshot(tmp_path / "pool")
    for _ in range(2):  # the second call changes nothing
        report = export_pool(pool, selection, tmp_path / "out", options(kind, materialize=materialize, rows_per_shard=4))
    index = PoolIndex.open(pool)
    generation = load_generation(selection, 2, index)
    facts = read_json(tmp_path / "out" / "export.json")
    assert (facts["kind"], facts["pool"], facts["pool_fingerprint"]) == (kind, str(pool), index.fingerprint)
    assert (facts["generation"], facts["generation_digest"]) == ("generation-000002", generation.digest)
    assert (facts["num_samples"], facts["num_tokens"]) == (generation.num_samples, generation.num_tokens)
    assert (report.num_samples, report.num_tokens, report.num_shards) == (generation.num_samples, generation.num_tokens, 2)
    assert snapshot(tmp_path / "pool") == before
    if materialize:
        made = PoolIndex.open(tmp_path / "out")
        assert selected_tokens(whole(made)) == selected_tokens(subset(index, MASK))
        assert made.member_format == ("json.gz" if kind in ("wids", "open_lm") else "raw")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "tfrecord"}, r"--format 'tfrecord' should be one of energon, open_lm, webdataset, wids"),
        ({"rows_per_shard": 0}, "--samples-per-shard 0 should be at least 1"),
        ({"max_excludes": -1}, "--max-excludes -1 should be at least 0"),
        ({"num_workers": -1}, "--workers -1 should be at least 0"),
    ],
)
def test_options_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExportOptions(**{"kind": "wids", **values})


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    pool, selection = pool_and_generation(tmp_path, member_format="json.gz")
    for materialize in (False, True):
        with pytest.raises(UserError, match=r"pool is the pool itself, into which an export writes nothing; choose another"):
            export_pool(pool, selection, pool, options("webdataset", materialize=materialize))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; name a directory"):
        export_pool(pool, selection, tmp_path / "file", options("webdataset"))
    export_pool(pool, selection, tmp_path / "out", options("webdataset"))
    with pytest.raises(UserError, match="out is an export for webdataset, not for energon"):
        export_pool(pool, selection, tmp_path / "out", options("energon"))
    with pytest.raises(UserError, match="out is an export with generation generation-000002, not None; choose another --output"):
        export_pool(pool, None, tmp_path / "out", options("webdataset"))
    other, _ = pool_and_generation(tmp_path / "other")
    with pytest.raises(UserError, match="pool is a pool; choose another directory"):
        export_pool(pool, selection, other, options("webdataset"))
    with pytest.raises(UserError, match="--member-format says how --materialize writes shards; without it"):
        export_pool(pool, selection, tmp_path / "new", options("webdataset", member_format="raw"))


def test_lengths_that_open_lm_cannot_read_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    samples = [np.arange(1, 4 + number % 2) for number in range(16)]
    pool, _ = pool_and_generation(tmp_path, samples=samples)
    with pytest.raises(UserError, match="open_lm needs samples of one length, these have 3 to 4 tokens"):
        export_pool(pool, None, tmp_path / "out", options("open_lm", materialize=True))
    assert not (tmp_path / "out").exists()


def test_an_export_to_a_store(tmp_path: Path, s3_options: dict) -> None:  # noqa: F811
    pool, selection = pool_and_generation(tmp_path)
    url = f"s3://{BUCKET}/export"
    for more in ({}, {"materialize": True}, {"work": tmp_path / "work"}):
        with pytest.raises(UserError, match=r"an export to s3://data/export needs --materialize.* and --work DIR"):
            export_pool(pool, selection, url, options("open_lm", **more))
    export_pool(pool, selection, url, options("open_lm", materialize=True, work=tmp_path / "work", rows_per_shard=2))
    names = {file.path.removeprefix(f"{url}/") for file in find_files(url)}
    assert names == set(snapshot(tmp_path / "work"))
    assert {"manifest.jsonl", "export.json", "shard_00000002.tar", "pool.json"} <= names
    assert selected_tokens(whole(PoolIndex.open(url))) == selected_tokens(open_subset(pool, selection))


def test_a_pool_in_a_store_is_exported_by_its_urls_or_materialised(tmp_path: Path, s3_options: dict) -> None:  # noqa: F811
    pool, selection = pool_and_generation(tmp_path)
    url = f"s3://{BUCKET}/pool"
    for path in pool.iterdir():
        upload(path, join(url, path.name))
    export_pool(url, selection, tmp_path / "local", options("webdataset"))
    facts = read_json(tmp_path / "local" / "export.json")
    assert facts["urls"] == [f"{url}/shard_{number:08d}.tar" for number in range(3)]
    for kind, message in (("energon", "Energon finds shards beside its metadata"), ("open_lm", "export with --materialize")):
        with pytest.raises(UserError, match=message):
            export_pool(url, selection, tmp_path / kind, options(kind))
    export_pool(url, selection, tmp_path / "out", options("energon", materialize=True))
    assert selected_tokens(whole(PoolIndex.open(tmp_path / "out"))) == selected_tokens(open_subset(pool, selection))


def test_tool(tmp_path: Path) -> None:
    pool_and_generation(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "--pool", "pool", "--workers", "0", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)

    done = run("--generation", "selection", "--format", "open_lm", "--output", "out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: 3 shards are selected in part") and "--materialize" in done.stderr
    done = run("--generation", "selection:2", "--format", "open_lm", "--output", "out", "--materialize", "--samples-per-shard", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "exported to out for open_lm\n  2 shards, 5 samples, 45 tokens\n"
