"""A build that stopped at any point: the same call continues, redoes only what is not finished, and gives the same pool."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess import passes
from megatron_groupmates.pool.preprocess.build import build_pool
from megatron_groupmates.pool.preprocess.options import BuildOptions
from tests.pool.helpers import documents, tiny_tokenizer, write_raw

OPTIONS = BuildOptions(pack=17, samples_per_shard=30, cell_bytes=800)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """(raw files, the pool that an undisturbed build makes of them)."""
    directory = tmp_path_factory.mktemp("expected")
    for number in range(4):
        write_raw(directory / "raw" / f"{number}.jsonl.zst", [*documents(30, number), b"{"])
    build_pool([directory / "raw"], directory / "pool", tiny_tokenizer(), OPTIONS)
    return directory / "raw", content(directory / "pool")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def build(raw: Path, directory: Path, **arguments: Any) -> dict | None:
    return build_pool([raw], directory / "pool", tiny_tokenizer(), OPTIONS, **arguments)[0]


class Counted:
    """Calls a function of ``passes`` and notes its tasks; from the call after ``limit`` on it fails."""

    def __init__(self, function: Callable, limit: int) -> None:
        self.function, self.limit = function, limit
        self.tasks: list[int] = []

    def __call__(self, context: Any, task: int, advance: Callable) -> None:
        if len(self.tasks) == self.limit:
            raise OSError(errno.EIO, "Input/output error", f"input {task}")
        self.function(context, task, advance)
        self.tasks.append(task)


@pytest.mark.parametrize("name", ["scatter_file", "gather_cell"])
def test_only_unfinished_work_is_done_again(
    tmp_path: Path, expected: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    raw, pool = expected
    function = getattr(passes, name)
    done: list[int] = []
    for limit in (2, 1, 0, 10_000):
        counted = Counted(function, limit)
        monkeypatch.setattr(passes, name, counted)
        if limit < 10_000:
            with pytest.raises(OSError, match="Input/output error"):
                build(raw, tmp_path)
            assert not (tmp_path / "pool" / "pool.json").exists()
        else:
            build(raw, tmp_path)
        done += counted.tasks
    assert len(done) == len(set(done)) > 3
    assert content(tmp_path / "pool") == pool
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


@pytest.mark.parametrize(
    "target",
    [
        "megatron_groupmates.pool.preprocess.scatter.SpoolWriter.finish",
        "megatron_groupmates.pool.preprocess.work.WorkDirectory.write_facts",
        "megatron_groupmates.pool.preprocess.gather.write_shard",
        "megatron_groupmates.pool.preprocess.gather.write_source_lines",
        "megatron_groupmates.pool.preprocess.gather.StoredShard.write",
        "megatron_groupmates.pool.preprocess.merge.write_all_rejects",
        "megatron_groupmates.pool.preprocess.merge.write_manifest",
        "megatron_groupmates.pool.index.write_json",
        "megatron_groupmates.utils.files.os.fsync",
        "megatron_groupmates.pool.preprocess.work.shutil.rmtree",
    ],
)
def test_a_full_disk_at_any_step(tmp_path: Path, expected: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(OSError, match="No space left"):
            build(expected[0], tmp_path)
    assert list(tmp_path.rglob("*.tmp-*")) == []
    build(expected[0], tmp_path)
    assert content(tmp_path / "pool") == expected[1]
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def interrupted(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, name: str = "gather_cell", limit: int = 1) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(passes, name, Counted(getattr(passes, name), limit))
        with pytest.raises(OSError, match="Input/output error"):
            build(raw, tmp_path)


def test_other_arguments_do_not_continue(tmp_path: Path, expected: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    raw, pool = expected
    interrupted(tmp_path, raw, monkeypatch)
    others = BuildOptions(pack=18, samples_per_shard=30, cell_bytes=800)
    message = r"work directory .*pool.work is of a build with other arguments \(pack was 17, is 18\); repeat that command"
    with pytest.raises(UserError, match=message):
        build_pool([raw], tmp_path / "pool", tiny_tokenizer(), others)
    with pytest.raises(UserError, match=r"\(inputs was .*, is "):
        build_pool([raw / "0.jsonl.zst"], tmp_path / "pool", tiny_tokenizer(), OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_groupmates.pool.preprocess.work.zstandard.ZSTD_VERSION", (0, 1, 2))
        with pytest.raises(UserError, match=r'versions was \{"zstd": .*\}, is \{"zstd": "0.1.2"\}'):
            build(raw, tmp_path)
    build(raw, tmp_path, num_workers=1, max_rejects=100)
    assert content(tmp_path / "pool") == pool


def test_a_lost_output_is_made_again(tmp_path: Path, expected: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    raw, pool = expected
    interrupted(tmp_path, raw, monkeypatch, limit=3)
    (tmp_path / "pool" / "shard_00000000.tar").unlink()
    (tmp_path / "pool" / "shard_00000001.meta.jsonl.zst").unlink()
    build(raw, tmp_path)
    assert content(tmp_path / "pool") == pool
    interrupted(tmp_path / "again", raw, monkeypatch, limit=3)
    shutil.rmtree(tmp_path / "again" / "pool")
    build(raw, tmp_path / "again")
    assert content(tmp_path / "again" / "pool") == pool


def test_partial_files_of_killed_processes_are_removed(
    tmp_path: Path, expected: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, pool = expected
    interrupted(tmp_path, raw, monkeypatch)
    for place in ("pool/shard_00000009.tar", "pool.work/files/00000000.spool", "pool.work/shards/00000001.record", "pool.work/plan.json"):
        (tmp_path / f"{place}.tmp-12345").write_bytes(b"partial")
    build(raw, tmp_path)
    assert content(tmp_path / "pool") == pool
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


@pytest.mark.parametrize("with_plan", [True, False])
def test_killed_while_tidying_up(tmp_path: Path, expected: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, with_plan: bool) -> None:
    """The pool is complete: all that is left to do is to remove the rest of the work directory."""
    raw, _ = expected
    interrupted(tmp_path, raw, monkeypatch)
    plan = (tmp_path / "pool.work" / "plan.json").read_bytes()
    build(raw, tmp_path)
    (tmp_path / "pool.work").mkdir()
    if with_plan:
        (tmp_path / "pool.work" / "plan.json").write_bytes(plan)
    build(raw, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_a_directory_of_the_users_is_left_alone(tmp_path: Path, expected: tuple[Path, dict]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"work directory .*mine holds something else \(notes\); choose another --work-directory"):
        build(expected[0], tmp_path, work_directory=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    build(expected[0], tmp_path)
    build(expected[0], tmp_path, work_directory=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "mine"
