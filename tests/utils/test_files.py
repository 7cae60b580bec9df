"""Files are complete or absent, whatever interrupts the writing: exceptions, kills before us, a full disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_groupmates.utils.files import (
    append_line,
    atomic_directory,
    atomic_file,
    read_json,
    read_lines,
    sha256_bytes,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel takes writes up to ``num_bytes`` into a file and refuses the rest, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old", None])
def test_an_exception_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: BaseException, old: bytes | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def sync_fails(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", full_disk)


def rename_fails(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "replace", full_disk)
    patch.setattr(os, "rename", full_disk)


@pytest.mark.parametrize("fail", [sync_fails, rename_fails])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, fail: Callable[[pytest.MonkeyPatch], None]) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError, match="No space left"):
            write_text(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_refused_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with largest_file(4096), pytest.raises(OSError) as caught:
        write_text(tmp_path / "file", "n" * 10_000)
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_json_reads_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "\u00e9"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text().endswith("}\n")


def test_a_directory_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "target"
    with atomic_directory(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("content")
        assert not path.exists()
    assert names(path.parent) == ["target"]
    assert (path / "inner" / "file").read_text() == "content"


def test_everything_in_a_directory_is_synced_before_its_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, (tmp_path / "target").exists())),
    )
    with atomic_directory(tmp_path / "target") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("content")
        name = partial.name
    assert sorted(synced) == sorted([("inner", False), ("file", False), (name, False), (tmp_path.name, True)])
    assert synced[-1] == (tmp_path.name, True)


def test_an_exception_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), atomic_directory(tmp_path / "target") as partial:
        (partial / "file").write_text("half")
        raise ValueError("mine")
    assert names(tmp_path) == []


@pytest.mark.parametrize("fail", [sync_fails, rename_fails])
def test_a_full_disk_leaves_no_directory(tmp_path: Path, fail: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "target") as partial:
            (partial / "file").write_text("whole")
    assert names(tmp_path) == []


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("target.tmp-123", "target.tmp-99999", "target2.tmp-5", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with atomic_directory(tmp_path / "target") as partial:
        assert names(partial) == []
    assert names(tmp_path) == ["other", "target", "target2.tmp-5"]


def test_a_directory_with_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("old")
    with pytest.raises(OSError), atomic_directory(tmp_path / "target") as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "old"


def test_lines_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    assert read_lines(path) == []
    for number in range(3):
        append_line(path, json.dumps({"n": number}))
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert read_lines(path) == [{"n": 0}, {"n": 1}, {"n": 2}]


@pytest.mark.parametrize("whole", [b"", b'{"n": 0}\n', b'{"n": 0}\n{"n": 1}\n'])
@pytest.mark.parametrize("torn", [b'{"n', b'{"n": 7}', b"\x00\x00"])
def test_a_torn_last_line_is_not_read_and_is_cut_by_the_next(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + torn)
    assert read_lines(path) == [json.loads(line) for line in whole.splitlines()]
    append_line(path, '{"n": 9}')
    assert path.read_bytes() == whole + b'{"n": 9}\n'


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"n"\n{"n": 1}\n')
    with pytest.raises(ValueError):
        read_lines(tmp_path / "log.jsonl")


def test_a_line_that_cannot_be_synced_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, '{"n": 0}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            append_line(path, '{"n": 1}')
    assert path.read_text() == '{"n": 0}\n'
    append_line(path, '{"n": 2}')
    assert read_lines(path) == [{"n": 0}, {"n": 2}]


@pytest.mark.parametrize("length", [200, 50_000])  # within and beyond the size of Python's file buffer
def test_a_line_that_is_half_taken_is_not_there(tmp_path: Path, length: int) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, json.dumps({"first": "x" * 4000}))
    before = path.read_bytes()
    with largest_file(len(before) + 37), pytest.raises(OSError) as caught:
        append_line(path, json.dumps({"second": "y" * length}))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    append_line(path, '{"n": 2}')
    assert read_lines(path)[1:] == [{"n": 2}]


def test_digests(tmp_path: Path) -> None:
    expected = hashlib.sha256(b"abcd").hexdigest()
    (tmp_path / "file").write_bytes(b"abcd")
    assert sha256_bytes(b"ab", memoryview(b"cd")) == sha256_file(tmp_path / "file") == expected
    assert sha256_json({"b": 1, "a": [2]}) == sha256_json({"a": [2], "b": 1}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    assert sha256_json({"a": [2], "b": 1}) != sha256_json({"a": [2], "b": 2})
