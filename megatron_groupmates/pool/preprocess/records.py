"""Raw documents: JSON lines, plain or compressed, as DCLM publishes them.

A line that cannot be used never ends a run and never vanishes: it is yielded as a :class:`Reject` in its place.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess.rawlines import DamagedFileError, StoredBytes, decompressed, split_lines
from megatron_groupmates.utils.storage import FileFacts, find_files, is_remote

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")
MAX_LINE_BYTES = 1 << 28

REJECT_KINDS = {
    "broken_json": "the line is not a JSON object",
    "bad_utf8": "the line or its text is not valid Unicode",
    "missing_text": "the record has no text, or it is not a string",
    "empty_text": "the text has nothing but white space",
    "line_too_long": f"the line is longer than {MAX_LINE_BYTES} bytes",
    "truncated_file": "the file ends early or is damaged from here on",
    "duplicate_input": "the file has the same content as an earlier input file",
    "low_quality": "the quality filter scores the text below its threshold",
    "no_tokens": "the tokenizer makes nothing of the text",
    "control_token": "the tokenizer cannot write a literal special token in the text as ordinary text",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One raw document.

    Attributes:
        text: not empty, valid Unicode.
        url: empty where unknown; DCLM's raw pool has it in the metadata.
        record: the whole JSON object.
        file: name of the input file.
        line: in that file, from 1 on.
    """

    text: str
    url: str
    record: dict[str, Any]
    file: str
    line: int

    @property
    def metadata(self) -> dict[str, Any]:
        """The record's ``metadata`` object; empty where it has none."""
        metadata = self.record.get("metadata")
        return metadata if isinstance(metadata, dict) else {}

    def field(self, dotted_path: str) -> str | None:
        """The value at ``a.b.c`` in the record, as a string of valid Unicode; None where there is none."""
        value = value_at(self.record, dotted_path)
        return None if value is None else _valid(value)


@dataclasses.dataclass(frozen=True)
class Reject:
    """A line that cannot be used: where it is and why (a key of ``REJECT_KINDS`` and the particulars)."""

    file: str
    line: int
    kind: str
    detail: str


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A raw data file.

    Attributes:
        name: path relative to the deepest directory that holds all inputs, so that it does not depend on where the data
            lies; the full path or URL where no directory does.
        path: local path or URL.
        num_bytes: its size; 0 where the store does not tell.
    """

    name: str
    path: str
    num_bytes: int


def find_inputs(inputs: Sequence[str | Path]) -> tuple[list[InputFile], list[str]]:
    """Raw data files among ``inputs``: files, glob patterns, and directories (searched to any depth), local or remote.

    Returns:
        (files sorted by name, each once; names of those that were found more than once, sorted).

    Raises:
        UserError: an input matches nothing, a file named is not of a known format, or a URL's protocol is not known.
        OSError: a remote store cannot be reached.
    """
    found: dict[str, int] = {}
    repeated: set[str] = set()
    for item in map(str, inputs):
        matches = _remote_files(item) if is_remote(item) else _local_files(item.removeprefix("file://"))
        for file in matches:
            if not file.path.endswith(SUFFIXES):
                raise UserError(f"input {file.path} is not of a known format; it must end in {', '.join(SUFFIXES)}")
            if file.path in found:
                repeated.add(file.path)
            found[file.path] = file.num_bytes or 0
        if not matches:
            raise UserError(f"input {item!r} matches no file ({', '.join(SUFFIXES)}); check the path")
    names = _names(list(found))
    files = [InputFile(names[path], path, size) for path, size in found.items()]
    return sorted(files, key=lambda file: file.name), sorted(names[path] for path in repeated)


def _local_files(item: str) -> list[FileFacts]:
    """Files that an input stands for; of those below a directory only the ones of a known format."""
    matches = [Path(item)] if os.path.exists(item) else [Path(match) for match in glob.glob(item, recursive=True)]
    files = {
        file.resolve()
        for match in matches
        for file in (match.rglob("*") if match.is_dir() else [match])
        if file.is_file() and (file.name.endswith(SUFFIXES) or file in matches)
    }
    return [FileFacts(str(file), file.stat().st_size) for file in files]


def _remote_files(url: str) -> list[FileFacts]:
    """As :func:`_local_files`, for a URL."""
    depth = url.rstrip("/").count("/")
    return [file for file in find_files(url) if file.path.endswith(SUFFIXES) or file.path.count("/") == depth or "**" in url]


def _names(paths: list[str]) -> dict[str, str]:
    """A name for each path, relative to their deepest common directory if there is one."""
    schemes = {path.split("://", 1)[0] if is_remote(path) else "" for path in paths}
    if len(schemes) > 1:
        return {path: path for path in paths}
    [scheme] = schemes
    inner = {path: path.removeprefix(f"{scheme}://") if scheme else path for path in paths}
    root = posixpath.commonpath([posixpath.dirname(path) for path in inner.values()])
    return {path: posixpath.relpath(name, root or ".") for path, name in inner.items()}


class DocumentFile:
    """One input file; iterating over it yields its documents and rejects in order. Picklable.

    Args:
        file: to read; its ending says how it is compressed.
        text_field: dotted path of the text in the record.

    Attributes:
        name: written into documents and rejects.
        num_bytes: of the file as stored.
        sha256: hex digest of the file as stored, after a complete pass; None before.

    Iterating raises:
        UserError: the URL's protocol is unknown or its package is not installed.
        OSError: the file cannot be read, after several attempts: not a property of the data, hence no reject.
    """

    def __init__(self, file: InputFile, text_field: str = "text") -> None:
        self._path = file.path
        self._text_field = text_field
        self._stored: StoredBytes | None = None
        self.name = file.name
        self.num_bytes = file.num_bytes
        self.sha256: str | None = None

    @property
    def position(self) -> int:
        """Bytes of the file, as stored, read so far."""
        return 0 if self._stored is None else self._stored.position

    def __iter__(self) -> Iterator[Document | Reject]:
        self._stored = StoredBytes(self._path, self.num_bytes)
        blocks = iter(self._stored)
        number = 0
        try:
            for number, (line, size) in enumerate(split_lines(decompressed(blocks, self._path), MAX_LINE_BYTES), start=1):
                if size > MAX_LINE_BYTES:
                    yield Reject(self.name, number, "line_too_long", f"{size} bytes")
                elif line and not line.isspace():
                    yield self._parse(line, number)
        except DamagedFileError as error:
            for _ in blocks:  # the digest is of the whole file
                pass
            yield Reject(self.name, number + 1, "truncated_file", str(error))
        self.sha256 = self._stored.sha256

    def _parse(self, line: bytes, number: int) -> Document | Reject:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return Reject(self.name, number, "bad_utf8", str(error))
        except (ValueError, RecursionError) as error:
            return Reject(self.name, number, "broken_json", str(error))
        if not isinstance(record, dict):
            return Reject(self.name, number, "broken_json", f"an object expected, found {type(record).__name__}")
        return self._document(record, number)

    def _document(self, record: dict[str, Any], number: int) -> Document | Reject:
        """What a record is; a file whose records have another form overrides this."""
        text = value_at(record, self._text_field)
        if not isinstance(text, str):
            return Reject(self.name, number, "missing_text", f"{self._text_field!r} is {type(text).__name__}")
        if not text or text.isspace():
            return Reject(self.name, number, "empty_text", f"{len(text)} characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
            return Reject(self.name, number, "bad_utf8", str(error))
        metadata = record.get("metadata")
        url = record.get("url") or (metadata.get("WARC-Target-URI") if isinstance(metadata, dict) else None) or ""
        return Document(text, _valid(url), record, self.name, number)


def domain_of(url: str) -> str:
    """Host of a URL in lower case, without ``www.``, port and user; empty where the URL names none."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # such as an unfinished IPv6 address
        return ""
    return host.removesuffix(".").removeprefix("www.")


def value_at(record: Any, dotted_path: str) -> Any:
    """The value at ``a.b.c`` in nested objects; None where there is none."""
    for name in dotted_path.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _valid(value: Any) -> str:
    """As a string that can be written as UTF-8: JSON may hold half of a surrogate pair."""
    return str(value).encode(errors="replace").decode()
