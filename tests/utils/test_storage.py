"""Local files and a real object store through the same functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.storage import (
    FileFacts,
    configure_storage,
    file_size,
    find_files,
    is_remote,
    join,
    open_input,
    read_all,
    read_ranges,
    storage_options,
    upload,
)
from tests.common.s3 import s3_options  # noqa: F401


@pytest.fixture(params=["local", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_options")
        return "s3://data/some/where"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/some/where"


def test_round_trip(place: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(200)))
    for name in ("a/1.jsonl", "b/2.jsonl", "b/c/3.txt"):
        upload(source, join(place, name))
    assert read_all(join(place, "b/2.jsonl")) == source.read_bytes()
    with open_input(join(place, "a/1.jsonl")) as file:
        assert file.read(3) == bytes((0, 1, 2))
        file.seek(100)
        assert file.read(1) == bytes([100])
    plain = place.removeprefix("file://")
    assert find_files(place) == [FileFacts(f"{plain}/{name}", 200) for name in ("a/1.jsonl", "b/2.jsonl", "b/c/3.txt")]
    assert find_files(join(place, "a/1.jsonl")) == [FileFacts(f"{plain}/a/1.jsonl", 200)]
    assert [file.path for file in find_files(join(place, "*/*.jsonl"))] == [f"{plain}/a/1.jsonl", f"{plain}/b/2.jsonl"]
    assert [file.path for file in find_files(join(place, "b*"))] == [f"{plain}/b/2.jsonl", f"{plain}/b/c/3.txt"]
    ranges = [(join(place, "a/1.jsonl"), 3, 6), (join(place, "b/2.jsonl"), 190, 260)]
    assert read_ranges(ranges) == [bytes((3, 4, 5)), bytes(range(190, 200))]
    assert read_ranges([]) == []


def test_absent(place: str, tmp_path: Path) -> None:
    assert file_size(join(place, "nothing")) is None
    assert find_files(place) == []
    assert find_files(join(place, "*.tar")) == []
    with pytest.raises(FileNotFoundError):
        read_all(join(place, "nothing"))
    source = tmp_path / "source"
    source.write_bytes(b"old")
    upload(source, join(place, "file"))
    assert file_size(join(place, "file")) == 3
    source.write_bytes(b"newer")
    upload(source, join(place, "file"))
    assert read_all(join(place, "file")) == b"newer"
    assert file_size(place) is None


def test_remote_or_not() -> None:
    assert [is_remote(path) for path in ("s3://b/x", "hf://datasets/x", "file:///x", "/x", "x", Path("/x"))] == [True, True, *[False] * 4]


def test_errors_of_the_store_are_os_errors(s3_options: dict) -> None:  # noqa: F811
    wrong = {"s3": {**s3_options["s3"], "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}}
    configure_storage(wrong)
    assert storage_options() == wrong
    with pytest.raises(OSError, match="s3://data/x"):
        read_all("s3://data/x")


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match=r"cannot open nosuch://x/y.*install its fsspec package"):
        read_all("nosuch://x/y")


def test_options_are_by_protocol() -> None:
    with pytest.raises(UserError, match=r"name arguments by protocol.*endpoint_url"):
        configure_storage({"endpoint_url": "x"})  # type: ignore[dict-item]
