"""Where samples come from: one zstd-compressed JSON line per sample, beside each shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.preprocess.rawlines import DamagedFileError, StoredBytes, decompressed, split_lines
from megatron_groupmates.utils.files import atomic_file, parse_json
from megatron_groupmates.utils.storage import file_size, join

_MAX_LINE_BYTES = 1 << 28

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def sources_path(directory: Path, shard_name: str) -> Path:
    """The file that tells where the samples of a shard come from."""
    return directory / f"{shard_name}.meta.jsonl.zst"


class DocumentSource:
    """Where a document comes from, prepared for the source lines of all samples that have a part of it.

    Args:
        file: name of the input file.
        line: in that file.
        url: empty where unknown.
        fields: what else the user wants to know of it, by name; may be empty.
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, file: str, line: int, url: str, fields: Mapping[str, str]) -> None:
        self._head = f'{{"file":{_encode(file)},"line":{line},"url":{_encode(url)},"first_token":'
        self._tail = f',"fields":{_encode(dict(fields))}}}' if fields else "}"

    def part(self, first_token: int, num_tokens: int) -> str:
        """JSON of a part of the document."""
        return f'{self._head}{first_token},"num_tokens":{num_tokens}{self._tail}'


def source_line(kind: str | None, parts: Iterable[str]) -> bytes:
    """Source line of a sample, without newline: its kind and the parts of documents (:meth:`DocumentSource.part`) in it."""
    return f'{{"kind":{_encode(kind)},"documents":[{",".join(parts)}]}}'.encode()


def write_source_lines(directory: Path, shard_name: str, lines: Iterable[bytes]) -> None:
    """Write the sources of a shard's samples, one line (:func:`source_line`) each, in the order of its rows.

    A line is ``{"kind", "documents": [{"file", "line", "url", "first_token", "num_tokens", "fields"}, ...]}``: the
    documents in the sample, and which tokens of each (its end-of-text token included). ``fields`` is there where the user
    named some.
    """
    compressor = zstandard.ZstdCompressor(level=3)
    with atomic_file(sources_path(directory, shard_name)) as file:
        file.write(compressor.compress(b"".join(line + b"\n" for line in lines)))


def write_sources(directory: Path, shard_name: str, samples: Iterable[dict[str, Any]]) -> None:
    """As :func:`write_source_lines`, from what :func:`read_sources` gives."""
    write_source_lines(directory, shard_name, (_encode(sample).encode() for sample in samples))


def read_sources(index: PoolIndex, shard_name: str) -> Iterator[dict[str, Any]]:
    """The sources of a shard's samples, row by row; nothing where the pool was made elsewhere and has none.

    Raises:
        UserError: the file is damaged, or has not one line for each sample.
        OSError: it cannot be read.
    """
    path = join(index.directory, sources_path(Path(), shard_name).name)
    num_bytes = file_size(path)
    if num_bytes is None:
        return
    expected = int(index.rows_per_shard[index.shard_names.index(shard_name)])
    number = 0
    try:
        for number, (line, _) in enumerate(split_lines(decompressed(StoredBytes(path, num_bytes), path), _MAX_LINE_BYTES), start=1):
            source = parse_json(line)
            if not isinstance(source, dict):
                raise ValueError(f"an object expected, found {line[:80]!r}")
            if number > expected:
                raise ValueError(f"shard {shard_name} has only {expected} samples")
            yield source
    except (DamagedFileError, ValueError) as error:
        raise UserError(f"{path} is damaged at line {number}: {error}; make the pool again") from error
    if number != expected:
        raise UserError(f"{path} has {number} lines, shard {shard_name} has {expected} samples; make the pool again")
