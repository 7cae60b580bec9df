"""Where samples come from: one zstd-compressed JSON line per sample, beside each shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.files import atomic_file


def sources_path(directory: Path, shard_name: str) -> Path:
    """The file that tells where the samples of a shard come from."""
    return directory / f"{shard_name}.meta.jsonl.zst"


def write_sources(directory: Path, shard_name: str, samples: Iterable[dict[str, Any]]) -> None:
    """Write the sources of a shard's samples, in the order of its rows.

    Each is ``{"kind", "documents": [{"file", "line", "url", "first_token", "num_tokens"}, ...]}``: the documents in the
    sample, and which tokens of each (its end-of-text token included).
    """
    compressor = zstandard.ZstdCompressor(level=3)
    with atomic_file(sources_path(directory, shard_name)) as file, compressor.stream_writer(file, closefd=False) as out:
        for sample in samples:
            out.write(json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def read_sources(index: PoolIndex, shard_name: str) -> Iterator[dict[str, Any]]:
    """The sources of a shard's samples, row by row; nothing where the pool was made elsewhere and has none."""
    path = sources_path(index.directory, shard_name)
    if path.is_file():
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
