"""Finding inputs and reading raw documents."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess import records as records_module
from megatron_groupmates.pool.preprocess.records import REJECT_KINDS, Document, DocumentFile, InputFile, Reject, domain_of, find_inputs
from megatron_groupmates.utils.storage import upload
from tests.common.s3 import s3_options  # noqa: F401
from tests.pool.helpers import documents, write_raw


def open_file(path: Path, name: str = "a", text_field: str = "text") -> DocumentFile:
    return DocumentFile(InputFile(name, str(path), path.stat().st_size), text_field)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.zstd"])
def test_every_format(tmp_path: Path, name: str) -> None:
    records = documents(500)
    path = write_raw(tmp_path / name, records)
    file = pickle.loads(pickle.dumps(open_file(path)))
    assert (file.position, file.sha256, file.num_bytes) == (0, None, path.stat().st_size)
    read = list(file)
    assert [item.text for item in read] == [record["text"] for record in records]
    assert [item.line for item in read] == list(range(1, 501))
    assert read[3] == Document(records[3]["text"], "http://x/0/3", records[3], "a", 4)
    assert read[3].metadata == {"kind": "book"}
    assert read[3].field("metadata.kind") == "book"
    assert read[3].field("metadata.kind.more") is None
    assert file.position == file.num_bytes
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(file) == read


def test_frames_of_any_kind(tmp_path: Path) -> None:
    """One frame, many, an empty one, with and without the content size in the header, skippable ones between."""
    line = json.dumps({"text": "words " * 1000}).encode() + b"\n"
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(line)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "a.jsonl.zst"
    sized = zstandard.compress(line * 3)
    path.write_bytes(sized + skippable + zstandard.compress(b"") + unsized + zstandard.compress(line))
    assert len(list(open_file(path))) == 5
    path.write_bytes(b"")
    assert list(open_file(path)) == []


def test_url_of_the_raw_pool(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.jsonl", [{"text": "x", "metadata": {"WARC-Target-URI": "http://w"}}, {"text": "y"}])
    assert [item.url for item in open_file(path)] == ["http://w", ""]


def test_nested_text_field(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.jsonl", [{"content": {"body": "x"}}, {"text": "y"}])
    first, second = open_file(path, text_field="content.body")
    assert first.text == "x"
    assert second == Reject("a", 2, "missing_text", "'content.body' is NoneType")


BAD_LINES = [
    (b'{"text": "x"', "broken_json"),
    (b"[1]", "broken_json"),
    (b"[" * 100_000, "broken_json"),
    (b'{"text": "\xff"}', "bad_utf8"),
    (b'{"text": "\\ud800"}', "bad_utf8"),
    (b'{"url": "x"}', "missing_text"),
    (b'{"text": 4}', "missing_text"),
    (b'{"text": ""}', "empty_text"),
    (b'{"text": " \\n"}', "empty_text"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_bad_lines_are_rejects_in_their_place(tmp_path: Path, name: str) -> None:
    good = b'{"text": "fine"}'
    lines = [part for line, _ in BAD_LINES for part in (good, b"", line)]
    read = list(open_file(write_raw(tmp_path / name, lines)))
    assert [item.text for item in read if isinstance(item, Document)] == ["fine"] * len(BAD_LINES)
    rejects = [item for item in read if isinstance(item, Reject)]
    assert [(item.file, item.line, item.kind) for item in rejects] == [
        ("a", 3 * number + 3, kind) for number, (_, kind) in enumerate(BAD_LINES)
    ]
    assert {item.kind for item in rejects} <= set(REJECT_KINDS)


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 100)
    lines = [{"text": "a"}, {"text": "b" * 345}, {"text": "c"}, {"text": "d" * 87}, {"text": "e" * 88}, {"text": "f" * 90}]
    read = list(open_file(write_raw(tmp_path / "a.jsonl.zst", lines)))
    assert read[1] == Reject("a", 2, "line_too_long", "358 bytes")
    assert [getattr(item, "kind", "good") for item in read] == ["good", "line_too_long", "good", "good", "line_too_long", "line_too_long"]
    assert [item.line for item in read] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_archive_keeps_what_came_before(tmp_path: Path, name: str, share: float) -> None:
    records = documents(3000)
    path = write_raw(tmp_path / name, records, num_frames=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    read = list(open_file(path))
    texts = [item.text for item in read if isinstance(item, Document)]
    assert texts == [record["text"] for record in records[: len(texts)]]
    assert Counter(item.kind for item in read if isinstance(item, Reject))["truncated_file"] == 1
    assert read[-1].line == len(read)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_garbage_is_one_reject(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not compressed at all\n" * 100)
    assert [(item.line, item.kind) for item in open_file(path)] == [(1, "truncated_file")]


def test_gzip_of_several_members(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n') + gzip.compress(b'{"text": "y"}\n'))
    assert [item.text for item in open_file(path)] == ["x", "y"]


def test_field_is_valid_unicode(tmp_path: Path) -> None:
    [document] = open_file(write_raw(tmp_path / "a.jsonl", [b'{"text": "x", "m": {"a": "\\ud800", "b": 4, "c": null}}']))
    assert [document.field(name) for name in ("m.a", "m.b", "m.c", "m.d")] == ["?", "4", None, None]


@pytest.mark.parametrize(
    ("url", "domain"),
    [
        ("https://www.Example.com:8080/a?b", "example.com"),
        ("http://user:secret@news.example.co.uk./x", "news.example.co.uk"),
        ("//example.com/x", "example.com"),
        ("http://www.com/", "com"),
        ("http://[::1]/x", "::1"),
        ("http://[::1/x", ""),
        ("example.com/x", ""),
        ("", ""),
    ],
)
def test_domain_of(url: str, domain: str) -> None:
    assert domain_of(url) == domain


def make_tree(root: Path) -> list[str]:
    """Raw files and one of another format; returns the names of the former."""
    for name in ("raw/a/1.jsonl", "raw/a/2.jsonl.gz", "raw/b/1.jsonl.zst", "raw/b/notes.txt"):
        write_raw(root / name, documents(3))
    return ["a/1.jsonl", "a/2.jsonl.gz", "b/1.jsonl.zst"]


def found(*inputs: str | Path) -> list[str]:
    return [file.name for file in find_inputs(inputs)[0]]


def test_find_inputs(tmp_path: Path) -> None:
    expected = make_tree(tmp_path)
    raw = tmp_path / "raw"
    assert found(raw) == found(f"file://{raw}") == expected
    assert found(raw / "*") == expected
    assert found(tmp_path / "**" / "*.jsonl*") == expected
    path = raw / "b/1.jsonl.zst"
    assert find_inputs([path]) == ([InputFile("1.jsonl.zst", str(path), path.stat().st_size)], [])
    bracket = write_raw(raw / "[a]" / "1.jsonl", [])
    assert found(bracket) == ["1.jsonl"]


def test_a_file_named_twice_is_used_once_and_reported(tmp_path: Path) -> None:
    expected = make_tree(tmp_path)
    raw = tmp_path / "raw"
    (raw / "c.jsonl").symlink_to(raw / "a" / "1.jsonl")
    files, repeated = find_inputs([raw / "a", raw, str(raw / "b/*.zst"), raw / "c.jsonl"])
    assert [file.name for file in files] == expected
    assert repeated == expected


def test_find_inputs_refuses(tmp_path: Path) -> None:
    write_raw(tmp_path / "notes.txt", [])
    with pytest.raises(UserError, match=r"input '.*/nothing-\*' matches no file \(.jsonl, .jsonl.gz"):
        find_inputs([tmp_path / "nothing-*"])
    with pytest.raises(UserError, match="matches no file"):
        find_inputs([tmp_path])
    for item in (tmp_path / "notes.txt", tmp_path / "*"):
        with pytest.raises(UserError, match=r"notes.txt is not of a known format; it must end in .jsonl, .jsonl.gz"):
            find_inputs([item])
    with pytest.raises(UserError, match=r"cannot open nonsense://a"):
        find_inputs(["nonsense://a"])


def test_remote_inputs(tmp_path: Path, s3_options: dict[str, Any]) -> None:  # noqa: F811
    """The same names and documents as from local files, through directories, globs and single URLs."""
    expected = make_tree(tmp_path)
    raw = tmp_path / "raw"
    for path in raw.rglob("*.*"):
        upload(path, f"s3://data/x/raw/{path.relative_to(raw)}")
    upload(raw / "a/1.jsonl", "s3://data/x/raw2/other.jsonl")
    assert found("s3://data/x/raw") == found("s3://data/x/raw/") == found("s3://data/x/raw/*") == expected
    assert found("s3://data/x/raw/**/*.jsonl*") == expected
    assert find_inputs(["s3://data/x/raw/a/*", "s3://data/x/raw/a/1.jsonl"])[1] == ["1.jsonl"]
    files, _ = find_inputs(["s3://data/x/raw"])
    for file, local in zip(files, find_inputs([raw])[0], strict=True):
        assert file == InputFile(local.name, f"s3://data/x/raw/{file.name}", local.num_bytes)
        remote = pickle.loads(pickle.dumps(DocumentFile(file)))
        assert list(remote) == list(DocumentFile(local))
        assert remote.sha256 == hashlib.sha256(Path(local.path).read_bytes()).hexdigest()
    mixed = [str(raw / "a/1.jsonl"), "s3://data/x/raw/a/1.jsonl"]
    assert found(*mixed) == sorted(mixed)
    with pytest.raises(UserError, match=r"notes.txt is not of a known format"):
        find_inputs(["s3://data/x/raw/b/*"])
    for item in ("s3://data/x/raw/b/notes.txt", "s3://data/nothing", "s3://data/x/no*"):
        with pytest.raises(UserError, match=r"notes.txt is not of a known format|matches no file"):
            find_inputs([item])
