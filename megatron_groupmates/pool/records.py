"""Raw documents: JSON lines, plain or compressed, as DCLM publishes them.

A line that cannot be used never ends a run and never vanishes: it is yielded as a :class:`Reject` in its place.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from megatron_groupmates.config.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")
MAX_LINE_BYTES = 1 << 28

REJECT_KINDS = {
    "broken_json": "the line is not a JSON object",
    "bad_utf8": "the line or its text is not valid Unicode",
    "missing_text": "the record has no text, or it is not a string",
    "empty_text": "the text has nothing but white space",
    "line_too_long": f"the line is longer than {MAX_LINE_BYTES} bytes",
    "truncated_file": "the file ends early or is damaged from here on",
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
        """The value at ``a.b.c`` in the record, as a string; None where there is none."""
        value: Any = self.record
        for name in dotted_path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return None if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Reject:
    """A line that cannot be used: where it is and why (a key of ``REJECT_KINDS`` and the particulars)."""

    file: str
    line: int
    kind: str
    detail: str


def find_inputs(inputs: Iterable[str | Path]) -> list[tuple[str, Path]]:
    """Raw data files among ``inputs``: files, glob patterns, and directories (searched to any depth).

    Returns:
        (name, path) pairs sorted by name, each file once. The name is the path relative to the deepest directory that
        holds all of them, so that it does not depend on where the data lies.

    Raises:
        UserError: an input matches nothing, or a file named is not of a known format.
    """
    found: set[Path] = set()
    for item in map(str, inputs):
        matches = [Path(item)] if os.path.exists(item) else [Path(match) for match in glob.glob(item, recursive=True)]
        files = [
            file
            for match in matches
            for file in (match.rglob("*") if match.is_dir() else [match])
            if file.is_file() and (file.name.endswith(SUFFIXES) or file in matches)
        ]
        if not files:
            raise UserError(f"input {item!r} matches no file ({', '.join(SUFFIXES)}); check the path")
        found.update(file.resolve() for file in files)
    for file in sorted(found):
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"input {file} is not of a known format; it must end in {', '.join(SUFFIXES)}")
    root = os.path.commonpath([file.parent for file in found])
    return sorted((file.relative_to(root).as_posix(), file) for file in found)


class _ZstdFrames(io.RawIOBase):
    """Decompressed bytes of all frames of a zstd file, one after the other.

    Raises ``EOFError`` where the file ends within a frame, which the library's own reader passes over in silence.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False
        self._compressed = self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame, self._inside_frame = zstandard.ZstdDecompressor().decompressobj(), False
            content = self._compressed or self._file.read(1 << 17)
            self._compressed = b""
            if not content:
                if self._inside_frame:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._inside_frame = True
            self._pending = self._frame.decompress(content)
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size


class DocumentFile:
    """One input file; iterating over it yields its documents and rejects in order.

    Args:
        path: of the file; its ending says how it is compressed.
        name: written into documents and rejects, ``path`` by default.
        text_field: dotted path of the text in the record.
    """

    def __init__(self, path: Path, name: str | None = None, text_field: str = "text") -> None:
        self._path = path
        self.name = str(path) if name is None else name
        self._text_field = text_field
        self._file: io.BufferedReader | None = None
        self.num_bytes = path.stat().st_size

    @property
    def position(self) -> int:
        """Bytes of the file read so far."""
        return 0 if self._file is None else self.num_bytes if self._file.closed else self._file.tell()

    def __iter__(self) -> Iterator[Document | Reject]:
        number = 0
        with open(self._path, "rb") as self._file:
            try:
                for number, line in enumerate(self._lines(self._file), start=1):
                    if len(line) >= MAX_LINE_BYTES:
                        yield Reject(self.name, number, "line_too_long", f"{len(line)} bytes or more")
                    elif not line.isspace():
                        yield self._parse(line, number)
            except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                yield Reject(self.name, number + 1, "truncated_file", str(error))

    def _lines(self, file: io.BufferedReader) -> Iterator[bytes]:
        """Lines; of one that is too long the first ``MAX_LINE_BYTES`` bytes."""
        content: Any = file
        if self._path.name.endswith(".gz"):
            content = gzip.GzipFile(fileobj=file)
        elif not self._path.name.endswith(".jsonl"):
            content = io.BufferedReader(_ZstdFrames(file), 1 << 17)
        while line := content.readline(MAX_LINE_BYTES):
            rest = line
            while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = content.readline(MAX_LINE_BYTES)
            yield line

    def _parse(self, line: bytes, number: int) -> Document | Reject:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return Reject(self.name, number, "bad_utf8", str(error))
        except (ValueError, RecursionError) as error:
            return Reject(self.name, number, "broken_json", str(error))
        if not isinstance(record, dict):
            return Reject(self.name, number, "broken_json", f"an object expected, found {type(record).__name__}")
        document = Document("", "", record, self.name, number)
        text: Any = record
        for name in self._text_field.split("."):
            text = text.get(name) if isinstance(text, dict) else None
        if not isinstance(text, str):
            return Reject(self.name, number, "missing_text", f"{self._text_field!r} is {type(text).__name__}")
        if not text or text.isspace():
            return Reject(self.name, number, "empty_text", f"{len(text)} characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
            return Reject(self.name, number, "bad_utf8", str(error))
        url = record.get("url") or document.metadata.get("WARC-Target-URI") or ""
        url = str(url).encode(errors="replace").decode()
        return dataclasses.replace(document, text=text, url=url)
