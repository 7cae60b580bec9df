"""The pool index: where every sample of a pool lies.

A pool is a directory with

- ``shard_XXXXXXXX.tar``: token shards, one member per sample (or ``shard_directory`` in ``pool.json`` says where they
  lie, relative to the pool);
- ``pool.json``: small facts (formats, tokenizer, kinds, and for each shard its counts, size and SHA-256);
- ``index.bin``: for all samples, shards in order of their names, four little-endian arrays one after the other:
  uint64 offset of the member's data in its tar, uint32 size of that data in bytes, int32 length in tokens, int16 kind
  (index into ``kinds``, -1 where unknown). Memory-mapped, so the processes of a host share one copy;
- ``manifest.jsonl``: DCLM's manifest, one ``{"num_sequences", "shard"}`` per line;
- ``tokenizer.json``: the tokenizer that made the ids;
- ``shard_XXXXXXXX.meta.jsonl.zst``: where the samples come from, see :mod:`megatron_groupmates.pool.sources`.

A sample's identity is (shard name, row in that tar). In memory it is a *pool row*: ``first_row[shard] + row``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import atomic_file, read_json, sha256_file, sha256_json, write_json, write_text

POOL_FILE = "pool.json"
INDEX_FILE = "index.bin"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "manifest.jsonl"
FORMAT = "megatron_groupmates pool"
VERSION = 1
MEMBER_FORMATS = ("raw", "json.gz")

_SECTIONS = (("<u8", "offsets"), ("<u4", "member_bytes"), ("<i4", "lengths"), ("<i2", "kind_of"))
_BYTES_PER_SAMPLE = sum(np.dtype(dtype).itemsize for dtype, _ in _SECTIONS)


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What the index keeps of one shard.

    Attributes:
        name: file name without ``.tar``, possibly with a sub-directory, as the manifest has it.
        offsets: uint64[rows], where each member's data begins in the tar, in bytes.
        member_bytes: uint32[rows], size of each member's data in bytes.
        lengths: int32[rows], tokens of each sample.
        num_bytes: size of the tar in bytes.
        sha256: hex digest of the tar.
    """

    name: str
    offsets: np.ndarray
    member_bytes: np.ndarray
    lengths: np.ndarray
    num_bytes: int
    sha256: str

    @property
    def facts(self) -> dict[str, Any]:
        """The shard's entry in ``pool.json``."""
        num_tokens = int(self.lengths.sum(dtype=np.int64))
        return {
            "name": self.name,
            "num_samples": len(self.lengths),
            "num_tokens": num_tokens,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
        }


@dataclasses.dataclass(frozen=True)
class PoolFacts:
    """Facts of a whole pool that its shards do not tell; written to ``pool.json`` as they are.

    Attributes:
        member_format: ``raw`` (little-endian ids) or ``json.gz`` (gzip of a JSON list, DCLM's).
        token_dtype: ``uint16`` or ``uint32``, the narrowest that holds every id.
        vocab_size: one more than the tokenizer's largest id.
        eot_id: id put after each document.
        tokenizer: ``name`` as the user gave it and ``fingerprint``, the SHA-256 of ``tokenizer.json``.
        kinds: names of the source kinds.
        made_by: arguments and counts of the tool that made the pool.
        shard_directory: where the shards lie, relative to the pool or absolute.
    """

    member_format: str
    token_dtype: str
    vocab_size: int
    eot_id: int
    tokenizer: dict[str, str]
    kinds: list[str]
    made_by: dict[str, Any]
    shard_directory: str = "."


def write_index(directory: Path | str, facts: PoolFacts, shards: Sequence[ShardRecord], kind_of: np.ndarray) -> None:
    """Write ``index.bin`` and, last, ``pool.json``. ``tokenizer.json`` must be there already.

    Args:
        directory: the pool.
        facts: of the whole pool.
        shards: every shard, sorted by name.
        kind_of: int16[num_samples], kind of each sample in pool order.
    """
    directory = Path(directory)
    names = [shard.name for shard in shards]
    assert names == sorted(set(names)), "shards must be sorted by name, each once"
    assert all(len(shard.lengths) for shard in shards), "a shard is empty"
    columns = {name: np.concatenate([getattr(shard, name) for shard in shards]) for name in ("offsets", "member_bytes", "lengths")}
    columns["kind_of"] = kind_of
    with atomic_file(directory / INDEX_FILE) as file:
        for dtype, name in _SECTIONS:
            assert len(columns[name]) == len(columns["lengths"]), name
            file.write(np.ascontiguousarray(columns[name], dtype=dtype).data)
    write_json(
        directory / POOL_FILE,
        {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(facts),
            "num_samples": len(columns["lengths"]),
            "num_tokens": int(columns["lengths"].sum(dtype=np.int64)),
            "index_sha256": sha256_file(directory / INDEX_FILE),
            "shards": [shard.facts for shard in shards],
        },
    )


def write_manifest(directory: Path | str, shards: Sequence[ShardRecord]) -> None:
    """Write DCLM's ``manifest.jsonl``, with a final newline: open_lm drops the last shard of one that has none."""
    lines = [json.dumps({"num_sequences": len(shard.lengths), "shard": shard.name}, separators=(",", ":")) + "\n" for shard in shards]
    write_text(Path(directory) / MANIFEST_FILE, "".join(lines))


class PoolIndex:
    """A pool opened for reading (layout in the module's docstring). Safe to share between threads and processes.

    Attributes:
        directory: the pool.
        shard_names: names of the shards, sorted.
        rows_per_shard: int64[num_shards].
        first_row: int64[num_shards + 1], pool row of each shard's first sample; the last is ``num_samples``.
        num_samples: samples in the pool.
        num_tokens: tokens in the pool.
        offsets, member_bytes, lengths, kind_of: the arrays of ``index.bin``, read-only and memory-mapped.
        kinds: names of the source kinds.
        member_format, token_dtype, vocab_size, eot_id, tokenizer: as in :class:`PoolFacts`.
        facts: the whole of ``pool.json``.
        fingerprint: hex SHA-256 over what identifies the content: the shards' names, counts and digests, in order,
            and the tokenizer's fingerprint.
    """

    def __init__(self, directory: Path, facts: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        """Use :meth:`open`."""
        shards = facts["shards"]
        self.directory = directory
        self.facts = facts
        self.shard_names: list[str] = [shard["name"] for shard in shards]
        self.rows_per_shard = np.array([shard["num_samples"] for shard in shards], dtype=np.int64)
        self.first_row = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.rows_per_shard)])
        self.num_samples: int = facts["num_samples"]
        self.num_tokens: int = facts["num_tokens"]
        self.offsets, self.member_bytes = columns["offsets"], columns["member_bytes"]
        self.lengths, self.kind_of = columns["lengths"], columns["kind_of"]
        self.kinds: list[str] = facts["kinds"]
        self.member_format: str = facts["member_format"]
        self.token_dtype: str = facts["token_dtype"]
        self.vocab_size: int = facts["vocab_size"]
        self.eot_id: int = facts["eot_id"]
        self.tokenizer: dict[str, str] = facts["tokenizer"]
        identity = [[shard["name"], shard["num_samples"], shard["num_tokens"], shard["sha256"]] for shard in shards]
        self.fingerprint = sha256_json([identity, self.tokenizer["fingerprint"]])
        self._shard_number = {name: number for number, name in enumerate(self.shard_names)}

    @classmethod
    def open(cls, directory: Path | str, verify: bool = True) -> PoolIndex:
        """Open the pool in ``directory``.

        Args:
            directory: the pool.
            verify: check the digests of index and tokenizer and every shard's presence and size; only False in a
                process whose parent has done so.

        Raises:
            UserError: there is no such directory, it is not a pool or an empty one, it is of another version, a shard
                is missing or has another size, or a digest does not match.
        """
        directory = Path(directory)
        facts = _read_facts(directory)
        columns = _map_columns(directory, facts)
        index = cls(directory, facts, columns)
        if verify:
            index._verify()
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its path: data loader workers map the file again instead of receiving a copy."""
        return PoolIndex.open, (self.directory, False)

    @property
    def num_shards(self) -> int:
        """Shards in the pool."""
        return len(self.shard_names)

    def shard_path(self, shard: int) -> Path:
        """The tar of shard number ``shard`` (in pool order)."""
        return self.directory / self.facts["shard_directory"] / f"{self.shard_names[shard]}.tar"

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pool rows to (shard number int64[n], row in that shard int64[n]).

        Raises:
            IndexError: a row is not in the pool.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_samples):
            raise IndexError(f"pool rows {rows.min()} to {rows.max()} are not all in range({self.num_samples})")
        shards = np.searchsorted(self.first_row, rows, side="right") - 1
        return shards, rows - self.first_row[shards]

    def rows(self, shard_name: str, rows_in_shard: np.ndarray) -> np.ndarray:
        """Rows of one shard to pool rows, int64[n].

        Raises:
            UserError: the pool has no such shard.
            IndexError: a row is not in the shard.
        """
        if shard_name not in self._shard_number:
            raise UserError(
                f"pool {self.directory} has no shard {shard_name!r}; it has {self.shard_names[0]!r} to {self.shard_names[-1]!r}"
            )
        number = self._shard_number[shard_name]
        rows = np.asarray(rows_in_shard, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows_per_shard[number]):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} are not all in shard {shard_name}, which has {self.rows_per_shard[number]}"
            )
        return rows + self.first_row[number]

    def _verify(self) -> None:
        for number, shard in enumerate(self.facts["shards"]):
            path = self.shard_path(number)
            if not path.is_file():
                raise UserError(f"pool {self.directory}: shard {path} is missing; restore it or make the pool again")
            size = path.stat().st_size
            if size != shard["num_bytes"]:
                raise UserError(
                    f"pool {self.directory}: shard {path} has {size} bytes, the index says "
                    f"{shard['num_bytes']}; restore it or make the pool again"
                )
        digests = {INDEX_FILE: self.facts["index_sha256"], TOKENIZER_FILE: self.tokenizer["fingerprint"]}
        for name, expected in digests.items():
            path = self.directory / name
            found = sha256_file(path) if path.is_file() else "missing"
            if found != expected:
                raise UserError(
                    f"pool {self.directory}: {name} is not the one the pool was made with (SHA-256 "
                    f"{found}, {POOL_FILE} says {expected}); restore it or make the pool again"
                )


def _read_facts(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"there is no pool at {directory}: no such directory; make one with tools/preprocess_dclm.py")
    path = directory / POOL_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} is not a pool: it has no {POOL_FILE}; make a pool with tools/preprocess_dclm.py, "
            "or index existing token shards with tools/index_pool.py"
        )
    try:
        facts = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; make the pool again") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path} is not the description of a pool: its format is not {FORMAT!r}")
    if facts.get("version") != VERSION:
        raise UserError(f"{path} has version {facts.get('version')!r}, this package reads {VERSION}; make the pool again")
    missing = {"num_samples", "num_tokens", "shards", "index_sha256", *(field.name for field in dataclasses.fields(PoolFacts))} - set(facts)
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}; make the pool again")
    if facts["num_samples"] == 0:
        raise UserError(f"pool {directory} is empty: it has no sample")
    return facts


def _map_columns(directory: Path, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    path, num_samples = directory / INDEX_FILE, facts["num_samples"]
    size, expected = path.stat().st_size if path.is_file() else 0, num_samples * _BYTES_PER_SAMPLE
    if size != expected or num_samples != sum(shard["num_samples"] for shard in facts["shards"]):
        raise UserError(
            f"pool {directory}: {INDEX_FILE} has {size} bytes, {num_samples} samples need {expected}; restore it or make the pool again"
        )
    content = np.memmap(path, dtype=np.uint8, mode="r")
    columns, offset = {}, 0
    for dtype, name in _SECTIONS:
        stop = offset + num_samples * np.dtype(dtype).itemsize
        columns[name] = np.asarray(content[offset:stop]).view(dtype)
        offset = stop
    return columns
