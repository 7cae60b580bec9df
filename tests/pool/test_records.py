"""Reading raw documents."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import records as records_module
from megatron_groupmates.pool.records import REJECT_KINDS, Document, DocumentFile, Reject, find_inputs
from tests.pool.helpers import documents, write_raw


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.zstd"])
def test_every_format(tmp_path: Path, name: str) -> None:
    records = documents(500)
    file = DocumentFile(write_raw(tmp_path / name, records), "a")
    read = list(file)
    assert [item.text for item in read] == [record["text"] for record in records]
    assert [item.line for item in read] == list(range(1, 501))
    assert read[3] == Document(records[3]["text"], "http://x/0/3", records[3], "a", 4)
    assert read[3].metadata == {"kind": "book"}
    assert read[3].field("metadata.kind") == "book"
    assert read[3].field("metadata.kind.more") is None
    assert file.position == file.num_bytes


def test_frames_of_any_kind(tmp_path: Path) -> None:
    """One frame, many, an empty one, with and without the content size in the header, skippable ones between."""
    line = json.dumps({"text": "words " * 1000}).encode() + b"\n"
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(line)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "a.jsonl.zst"
    sized = zstandard.compress(line * 3)
    path.write_bytes(sized + skippable + zstandard.compress(b"") + unsized + zstandard.compress(line))
    assert len(list(DocumentFile(path))) == 5
    path.write_bytes(b"")
    assert list(DocumentFile(path)) == []


def test_url_of_the_raw_pool(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.jsonl", [{"text": "x", "metadata": {"WARC-Target-URI": "http://w"}}, {"text": "y"}])
    assert [item.url for item in DocumentFile(path)] == ["http://w", ""]


def test_nested_text_field(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.jsonl", [{"content": {"body": "x"}}, {"text": "y"}])
    first, second = DocumentFile(path, "a", "content.body")
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
    read = list(DocumentFile(write_raw(tmp_path / name, lines), "a"))
    assert [item.text for item in read if isinstance(item, Document)] == ["fine"] * len(BAD_LINES)
    rejects = [item for item in read if isinstance(item, Reject)]
    assert [(item.file, item.line, item.kind) for item in rejects] == [
        ("a", 3 * number + 3, kind) for number, (_, kind) in enumerate(BAD_LINES)
    ]
    assert {item.kind for item in rejects} <= set(REJECT_KINDS)


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 100)
    lines = [{"text": "a"}, {"text": "b" * 345}, {"text": "c"}]
    read = list(DocumentFile(write_raw(tmp_path / "a.jsonl.zst", lines), "a"))
    assert [getattr(item, "kind", "good") for item in read] == ["good", "line_too_long", "good"]
    assert read[2].line == 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_archive_keeps_what_came_before(tmp_path: Path, name: str, share: float) -> None:
    records = documents(3000)
    path = write_raw(tmp_path / name, records, num_frames=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    read = list(DocumentFile(path, "a"))
    texts = [item.text for item in read if isinstance(item, Document)]
    assert texts == [record["text"] for record in records[: len(texts)]]
    assert Counter(item.kind for item in read if isinstance(item, Reject))["truncated_file"] == 1
    assert read[-1].line == len(read)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_garbage_is_one_reject(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not compressed at all\n" * 100)
    assert [(item.line, item.kind) for item in DocumentFile(path, "a")] == [(1, "truncated_file")]


def test_gzip_of_several_members(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n') + gzip.compress(b'{"text": "y"}\n'))
    assert [item.text for item in DocumentFile(path)] == ["x", "y"]


def test_find_inputs(tmp_path: Path) -> None:
    for name in ("raw/a/1.jsonl", "raw/a/2.jsonl.gz", "raw/b/1.jsonl.zst", "raw/b/notes.txt"):
        write_raw(tmp_path / name, [])
    expected = ["a/1.jsonl", "a/2.jsonl.gz", "b/1.jsonl.zst"]
    assert [name for name, _ in find_inputs([tmp_path / "raw"])] == expected
    assert [name for name, _ in find_inputs([str(tmp_path / "raw" / "*")])] == expected
    assert [name for name, _ in find_inputs([str(tmp_path / "**" / "*.jsonl*")])] == expected
    twice = find_inputs([tmp_path / "raw/b", tmp_path / "raw/b/1.jsonl.zst", str(tmp_path / "raw/b/*.zst")])
    assert twice == [("1.jsonl.zst", tmp_path / "raw/b/1.jsonl.zst")]


def test_find_inputs_refuses(tmp_path: Path) -> None:
    write_raw(tmp_path / "notes.txt", [])
    with pytest.raises(UserError, match=r"input '.*/nothing-\*' matches no file \(.jsonl, .jsonl.gz"):
        find_inputs([tmp_path / "nothing-*"])
    with pytest.raises(UserError, match="matches no file"):
        find_inputs([tmp_path])
    with pytest.raises(UserError, match=r"notes.txt is not of a known format; it must end in .jsonl, .jsonl.gz"):
        find_inputs([tmp_path / "notes.txt"])
