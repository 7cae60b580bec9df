"""Generations: immutable selections of a pool's samples, and the pointer that names the newest.

``<selection directory>/generation-000003/`` holds

- ``rows.bin``: one bit per sample (``np.packbits`` order), shards in pool order, each shard's bits filled up with zeros
  to a whole byte;
- ``generation.json``: number, pool fingerprint, counts, SHA-256 of ``rows.bin``, per shard ``[name, rows, selected
  rows, selected tokens]``, provenance, and ``digest``, the SHA-256 of all the rest.

``<selection directory>/latest`` is one line, the name of the newest generation's directory.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.files import atomic_directory, read_sealed_json, sealed, sha256_bytes, write_bytes, write_json, write_text

POINTER_FILE = "latest"
_FACTS_FILE = "generation.json"
_ROWS_FILE = "rows.bin"
_FORMAT = "megatron_groupmates generation"
_VERSION = 1
_BLOCK = 1 << 16  # rows counted at a time


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation, read and verified.

    Attributes:
        number: of the generation.
        mask: bool[pool's num_samples], True where the sample is selected.
        num_samples: selected samples, at least 1.
        num_tokens: their tokens.
        digest: hex SHA-256 that identifies content and provenance.
        provenance: what :func:`write_generation` was given.
    """

    number: int
    mask: np.ndarray
    num_samples: int
    num_tokens: int
    digest: str
    provenance: dict[str, Any]


def generation_name(number: int) -> str:
    """Name of a generation's directory."""
    return f"generation-{number:06d}"


def generation_path(selection_dir: Path | str, number: int) -> Path:
    """A generation's directory."""
    return Path(selection_dir) / generation_name(number)


def write_generation(
    selection_dir: Path | str, number: int, pool_index: PoolIndex, rows: np.ndarray | None, provenance: dict[str, Any]
) -> Path:
    """Write a generation; its directory is complete or absent. One process calls this.

    Writing the same generation again is allowed and changes nothing, so that a killed caller can start over.

    Args:
        selection_dir: the run's selection directory.
        number: of the generation, from 0 on.
        pool_index: the pool the rows are of.
        rows: pool rows, int64[n], each once, in any order; None for the whole pool.
        provenance: JSON values that say where the selection comes from.

    Returns:
        The generation's directory.

    Raises:
        UserError: no row is selected, or the number is taken by a generation with other content.
    """
    mask = np.ones(pool_index.num_samples, dtype=bool)
    if rows is not None:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size == 0:
            raise UserError(f"generation {number} selects nothing; raise the selection ratio or the token budget")
        pool_index.locate(rows)  # every row is in the pool
        mask[:] = False
        mask[rows] = True
        assert int(mask.sum()) == rows.size, "a row is selected twice"
    bits = _pack(mask, pool_index)
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "number": number,
        "pool_fingerprint": pool_index.fingerprint,
        "num_samples": int(mask.sum()),
        "num_tokens": int(pool_index.lengths[mask].sum(dtype=np.int64)),
        "rows_sha256": sha256_bytes(bits),
        "shards": _shard_counts(mask, pool_index),
        "provenance": provenance,
    }
    facts = sealed(facts)
    path = generation_path(selection_dir, number)
    if path.exists():
        present = load_generation(selection_dir, number, pool_index)
        if present.digest != facts["digest"]:
            raise UserError(
                f"{path} exists with other content (digest {present.digest}, not {facts['digest']}); a "
                "generation is never changed: use the next number"
            )
        return path
    with atomic_directory(path) as partial:
        write_bytes(partial / _ROWS_FILE, bits)
        write_json(partial / _FACTS_FILE, facts)
    return path


def load_generation(selection_dir: Path | str, number: int, pool_index: PoolIndex) -> Generation:
    """Read a generation and verify its digests and that it is of this pool.

    Raises:
        UserError: it is absent or damaged, or was made for another pool; says which check failed and both values.
    """
    path = generation_path(selection_dir, number)
    facts = _read_facts(path, number)
    if facts["pool_fingerprint"] != pool_index.fingerprint:
        raise UserError(
            f"{path} was made for another pool: its fingerprint is {facts['pool_fingerprint']}, that of "
            f"{pool_index.directory} is {pool_index.fingerprint}"
        )
    rows_path = path / _ROWS_FILE
    bits = rows_path.read_bytes() if rows_path.is_file() else b""
    if sha256_bytes(bits) != facts["rows_sha256"]:
        raise UserError(f"{rows_path} is damaged: SHA-256 {sha256_bytes(bits)}, {_FACTS_FILE} says {facts['rows_sha256']}")
    mask = _unpack(bits, pool_index)
    if int(mask.sum()) != facts["num_samples"] or _shard_counts(mask, pool_index) != facts["shards"]:
        raise UserError(
            f"{path} is damaged: {_ROWS_FILE} selects {int(mask.sum())} samples, {_FACTS_FILE} says "
            f"{facts['num_samples']}, or the counts of a shard differ"
        )
    return Generation(
        number=number,
        mask=mask,
        num_samples=facts["num_samples"],
        num_tokens=facts["num_tokens"],
        digest=facts["digest"],
        provenance=facts["provenance"],
    )


def publish(selection_dir: Path | str, number: int) -> None:
    """Atomically make ``number`` the newest generation.

    Raises:
        UserError: there is no such generation.
    """
    path = generation_path(selection_dir, number)
    if not (path / _FACTS_FILE).is_file():
        raise UserError(f"cannot publish generation {number}: {path} is missing or incomplete")
    write_text(Path(selection_dir) / POINTER_FILE, generation_name(number) + "\n")


def read_pointer(selection_dir: Path | str) -> int | None:
    """Number of the newest generation; None where none has been published.

    Raises:
        UserError: the pointer file says something else than the name of a generation.
    """
    path = Path(selection_dir) / POINTER_FILE
    if not path.exists():
        return None
    content = path.read_text(errors="replace")
    match = re.fullmatch(r"generation-([0-9]{6,})\n?", content)
    if match is None or generation_name(int(match.group(1))) != content.rstrip("\n"):
        raise UserError(f"{path} should name a generation, such as {generation_name(3)}, it says {content[:80]!r}")
    return int(match.group(1))


def read_provenance(selection_dir: Path | str, number: int) -> dict[str, Any]:
    """Provenance of a generation, without reading its rows or a pool.

    Raises:
        UserError: it is absent or its facts are damaged.
    """
    return _read_facts(generation_path(selection_dir, number), number)["provenance"]


def _read_facts(path: Path, number: int) -> dict[str, Any]:
    facts_path = path / _FACTS_FILE
    if not facts_path.is_file():
        raise UserError(f"there is no generation {number}: {facts_path} is missing")
    facts = read_sealed_json(facts_path, "a generation", _FORMAT, _VERSION, "restore it from a copy")
    if facts["number"] != number:
        raise UserError(f"{facts_path} is generation {facts['number']}, not {number}: the directory has been renamed")
    return facts


def _pack(mask: np.ndarray, pool_index: PoolIndex) -> bytes:
    return b"".join(np.packbits(part).tobytes() for part in np.split(mask, pool_index.first_row[1:-1]))


def _unpack(bits: bytes, pool_index: PoolIndex) -> np.ndarray:
    """bool[num_samples]; ``bits`` are known to be those written for this pool, so their number fits."""
    content = np.frombuffer(bits, dtype=np.uint8)
    stops = np.cumsum((pool_index.rows_per_shard + 7) // 8)
    parts = np.split(content, stops[:-1])
    return np.concatenate(
        [np.unpackbits(part, count=int(rows)).view(bool) for part, rows in zip(parts, pool_index.rows_per_shard, strict=True)]
    )


def _shard_counts(mask: np.ndarray, pool_index: PoolIndex) -> list[list[Any]]:
    """Per shard ``[name, rows, selected rows, selected tokens]``."""
    edges = pool_index.first_row
    selected, tokens = np.empty((2, pool_index.num_shards), dtype=np.int64)
    first = 0
    while first < pool_index.num_shards:
        # Some shards at a time: temporaries stay in the processor's cache.
        stop = max(first + 1, int(np.searchsorted(edges, edges[first] + _BLOCK, side="right")) - 1)
        rows, starts = slice(edges[first], edges[stop]), edges[first:stop] - edges[first]
        selected[first:stop] = np.add.reduceat(mask[rows].astype(np.int64), starts)
        tokens[first:stop] = np.add.reduceat(np.multiply(mask[rows], pool_index.lengths[rows], dtype=np.int64), starts)
        first = stop
    counts = zip(pool_index.shard_names, pool_index.rows_per_shard.tolist(), selected.tolist(), tokens.tolist(), strict=True)
    return [list(count) for count in counts]
