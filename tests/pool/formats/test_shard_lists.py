"""Lists of existing shards, as other tools write them; the real packages write theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.shard_lists import list_shards
from megatron_groupmates.utils.storage import join, upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.tars import json_member, random_samples, write_tar


def shards(directory: Path, counts: tuple[int, ...] = (2, 3)) -> list[Path]:
    return [
        write_tar(
            directory / f"shard_{number:08d}.tar",
            [(f"{number}_{row}.json.gz", json_member(sample)) for row, sample in enumerate(random_samples(count))],
        )
        for number, count in enumerate(counts)
    ]


COUNTS = {"shard_00000000": 2, "shard_00000001": 3}


def test_a_plain_directory_is_searched_to_any_depth(tmp_path: Path) -> None:
    shards(tmp_path / "a")
    shards(tmp_path / "a" / "b", (1,))
    found = list_shards(tmp_path)
    assert found.counts == {"a/b/shard_00000000": None, "a/shard_00000000": None, "a/shard_00000001": None}
    assert (found.directory, found.said_by, found.extra, found.repeated) == (str(tmp_path), None, [], [])
    assert found.path("a/shard_00000000") == str(tmp_path / "a" / "shard_00000000.tar")


def test_a_manifest_may_lead_out_of_its_directory(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "manifest.jsonl").write_text('{"shard": "../shards/shard_00000001", "num_sequences": 3}\n')
    assert list_shards(tmp_path / "lists").counts == {"../shards/shard_00000001": 3}


def test_an_energon_data_set(tmp_path: Path) -> None:
    shards(tmp_path)
    program = "import sys; from megatron.energon.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "prepare", "--non-interactive", "--split-parts", "train:shard_.*", "--num-workers", "1"]
    command += ["--sample-type", "CrudeWebdataset", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    write_tar(tmp_path / "late.tar", [])
    found = list_shards(tmp_path)
    assert (found.counts, found.extra) == (COUNTS, ["late"])
    (tmp_path / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"x.tar.gz": 1}}')
    with pytest.raises(UserError, match=r"info.json lists 'x.tar.gz', which is not a .tar"):
        list_shards(tmp_path)
    (tmp_path / ".nv-meta" / ".info.json").write_text("[]")
    with pytest.raises(UserError, match=r"info.json is not an Energon data set: it should have \"shard_counts\""):
        list_shards(tmp_path)


def test_a_wids_index_made_by_wids(tmp_path: Path) -> None:
    paths = shards(tmp_path / "data")
    index = tmp_path / "data" / "index.json"
    program = "import sys; from wids.wids_index import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "create", "--output", str(index), *(path.name for path in paths)]
    done = subprocess.run(command, cwd=tmp_path / "data", capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    moved = tmp_path / "elsewhere" / "index.json"
    moved.parent.mkdir()
    for place, base in ((index, None), (moved, str(tmp_path / "data")), (moved, "../data")):
        if base is not None:
            moved.write_text(json.dumps({**json.loads(index.read_text()), "base": base}))
        found = list_shards(place)
        assert (found.directory, found.counts, found.said_by) == (str(tmp_path / "data"), COUNTS, str(place))


def wids_index(path: Path, *urls: str, **more: object) -> Path:
    entries = [{"url": url, "nsamples": 2} for url in urls]
    path.write_text(json.dumps({"wids_version": 1, "shardlist": entries, **more}))
    return path


def test_a_wids_index_of_several_directories(tmp_path: Path) -> None:
    first, second = shards(tmp_path / "a")[0], shards(tmp_path / "b")[0]
    nested = {"datasets": [{"shardlist": [{"url": str(second), "nsamples": 2}]}]}
    found = list_shards(wids_index(tmp_path / "index.json", f"file://{first}", **nested))
    assert (found.directory, found.counts) == (str(tmp_path), {"a/shard_00000000": 2, "b/shard_00000000": 2})
    assert found.extra == ["a/shard_00000001", "b/shard_00000001"]


def test_shards_in_a_store(tmp_path: Path, s3_options: dict) -> None:  # noqa: F811
    url = f"s3://{BUCKET}/some/where"
    for path in shards(tmp_path):
        upload(path, join(url, path.name))
    upload(wids_index(tmp_path / "index.json", "shard_00000000.tar"), join(url, "index.json"))
    assert list_shards(url).counts == dict.fromkeys(COUNTS)
    assert list_shards(url + "/").path("shard_00000000") == f"{url}/shard_00000000.tar"
    for index in (f"{url}/index.json", wids_index(tmp_path / "local.json", f"{url}/shard_00000000.tar")):
        found = list_shards(index)
        assert (found.directory, found.counts, found.extra) == (url, {"shard_00000000": 2}, ["shard_00000001"])
    with pytest.raises(UserError, match=r"1 of the 1 shards of .*gone.json are missing: nothing"):
        list_shards(wids_index(tmp_path / "gone.json", f"{url}/nothing.tar"))
    with pytest.raises(UserError, match=r"s3://data/none has no token shards: no \*\.tar files"):
        list_shards(f"s3://{BUCKET}/none")


@pytest.mark.parametrize(
    ("urls", "more", "message"),
    [
        (("pipe:cat x.tar",), {}, "reads 'pipe:cat x.tar' through a command; name the shards by path or URL"),
        (("s3://a/x.tar", "s3://b/x.tar"), {}, "lie in several stores or buckets"),
        (("s3://a/x.tar", "/b/x.tar"), {}, "lie in several stores or buckets"),
        (("x.tar.gz",), {}, "lists 'x.tar.gz', which is not a .tar"),
        ((), {}, "lists no token shards"),
        ((), {"datasets": [{"source_url": "y.json"}]}, "refers to other indices by source_url"),
        ((), {"shardlist": [{"url": "x.tar"}]}, "is not a wids index: it should have a"),
        ((), {"shardlist": 3}, "is not a wids index: it should have a"),
    ],
)
def test_wids_indices_that_cannot_be_used(tmp_path: Path, urls: tuple[str, ...], more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_shards(wids_index(tmp_path / "index.json", *urls, **more))


def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no wids index .*/none.json"):
        list_shards(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"there is no directory .*/none; check"):
        list_shards(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no token shards: no \*.tar files, and no manifest.jsonl or .nv-meta"):
        list_shards(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad.json is not a wids index"):
        list_shards(tmp_path / "bad.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no directory {tmp_path}/relative"):
        list_shards("relative")
