"""The pool index: where every sample of a pool lies.

A pool is a directory with

- ``shard_XXXXXXXX.tar``: token shards, one member per sample (or ``shard_directory`` in ``pool.json`` says where they
  lie: a URL, or a directory relative to the pool or absolute);
- ``pool.json``: small facts (formats, tokenizer, kinds, and for each shard its counts, size and SHA-256), and ``digest``, the
  SHA-256 of all of them but ``shard_directory``: shards may be moved;
- ``index.bin``: for all samples, shards in order of their names, four little-endian arrays one after the other:
  uint64 offset of the member's data in its tar, uint32 size of that data in bytes, int32 length in tokens, int16 kind
  (index into ``kinds``, -1 where unknown). Memory-mapped, so the processes of a host share one copy;
- ``manifest.jsonl``: DCLM's manifest, one ``{"num_sequences", "shard"}`` per line;
- ``tokenizer.json``: the tokenizer that made the ids;
- ``shard_XXXXXXXX.meta.jsonl.zst``: where the samples come from, see :mod:`megatron_groupmates.pool.sources`.

The directory may be a URL of any fsspec file system: then index and tokenizer are copied to a cache on this host, and
:class:`megatron_groupmates.pool.reader.PoolReader` reads ranges of the shards.

A sample's identity is (shard name, row in that tar). In memory it is a *pool row*: ``first_row[shard] + row``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.remote import RemoteSettings, fetch_files
from megatron_groupmates.pool.shard_check import check_shards
from megatron_groupmates.utils.files import atomic_file, sha256_file, sha256_json, write_json, write_text
from megatron_groupmates.utils.storage import configure_storage, is_remote, join, read_all, storage_options

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
        shard_directory: where the shards lie: a URL, or a directory relative to the pool or absolute.
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
    facts_of_shards = [shard.facts for shard in shards]
    num_samples, num_tokens = (sum(entry[name] for entry in facts_of_shards) for name in ("num_samples", "num_tokens"))
    assert len(kind_of) == num_samples, "a kind for each sample"
    with atomic_file(directory / INDEX_FILE) as file:
        # Shard by shard: the whole of a column may be larger than memory.
        for dtype, name in _SECTIONS[:-1]:
            for shard in shards:
                file.write(np.ascontiguousarray(getattr(shard, name), dtype=dtype).data)
        file.write(np.ascontiguousarray(kind_of, dtype=_SECTIONS[-1][0]).data)
    description = {
        "format": FORMAT,
        "version": VERSION,
        **dataclasses.asdict(facts),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "index_sha256": sha256_file(directory / INDEX_FILE),
        "shards": facts_of_shards,
    }
    write_json(directory / POOL_FILE, {**description, "digest": description_digest(description)})


def description_digest(description: Mapping[str, Any]) -> str:
    """``digest`` of the content of a ``pool.json``."""
    return sha256_json({name: value for name, value in description.items() if name not in ("digest", "shard_directory")})


def write_manifest(directory: Path | str, shards: Sequence[ShardRecord]) -> None:
    """Write DCLM's ``manifest.jsonl``, with a final newline: open_lm drops the last shard of one that has none."""
    lines = [json.dumps({"num_sequences": len(shard.lengths), "shard": shard.name}, separators=(",", ":")) + "\n" for shard in shards]
    write_text(Path(directory) / MANIFEST_FILE, "".join(lines))


class PoolIndex:
    """A pool opened for reading (layout in the module's docstring). Safe to share between threads and processes.

    Attributes:
        directory: the pool; the URL of a remote one.
        shard_directory: where the shards lie, a path or URL.
        remote: what is kept of a remote pool on this host.
        shard_names: names of the shards, sorted.
        shard_sizes: int64[num_shards], bytes of each shard.
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

    def __init__(self, directory: Path | str, local: Path, facts: dict[str, Any], remote: RemoteSettings) -> None:
        """Use :meth:`open`. ``local`` is where ``index.bin`` and ``tokenizer.json`` lie on this host."""
        shards = facts["shards"]
        self.directory = directory
        self.shard_directory = _resolve(directory, facts["shard_directory"])
        self.remote = remote
        self.facts = facts
        self.shard_names: list[str] = [shard["name"] for shard in shards]
        self.shard_sizes = np.array([shard["num_bytes"] for shard in shards], dtype=np.int64)
        self.rows_per_shard = np.array([shard["num_samples"] for shard in shards], dtype=np.int64)
        self.first_row = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.rows_per_shard)])
        self.num_samples: int = facts["num_samples"]
        self.num_tokens: int = facts["num_tokens"]
        columns = _map_columns(directory, local, facts)
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
        self._local = local
        self._shard_number = {name: number for number, name in enumerate(self.shard_names)}

    @classmethod
    def open(cls, directory: Path | str, verify: bool = True, remote: RemoteSettings | None = None) -> PoolIndex:
        """Open the pool in ``directory``, a path or URL.

        Args:
            directory: the pool.
            verify: check the digests of index and tokenizer and every shard's presence and size; only False in a
                process whose parent has done so.
            remote: what to keep of a remote pool on this host; the defaults of the settings when None.

        Raises:
            UserError: there is no such directory, it is not a pool or an empty one, it is of another version, shards
                are missing or have another size, a digest does not match, or the storage fails.
        """
        directory = str(directory).rstrip("/") if is_remote(directory) else Path(str(directory).removeprefix("file://"))
        try:
            return cls._open(directory, verify, remote or RemoteSettings())
        except OSError as error:
            raise UserError(
                f"pool {directory} cannot be opened: {error}; check the path or URL, and for a store its credentials "
                "and data.storage_options"
            ) from error

    @classmethod
    def _open(cls, directory: Path | str, verify: bool, remote: RemoteSettings) -> PoolIndex:
        content = _read_description(directory)
        facts = _parse_facts(directory, content)
        digests = {INDEX_FILE: facts["index_sha256"], TOKENIZER_FILE: facts["tokenizer"]["fingerprint"]}
        local = fetch_files(directory, digests, content, remote, verify) if isinstance(directory, str) else directory
        index = cls(directory, local, facts, remote)
        if verify:
            check_shards(directory, index.shard_directory, index.shard_names, index.shard_sizes.tolist())
            if local == directory:
                index._verify_digests(digests)
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its path: data loader workers map the file again instead of receiving a copy."""
        return _reopen, (self.directory, self.remote, storage_options())

    @property
    def num_shards(self) -> int:
        """Shards in the pool."""
        return len(self.shard_names)

    @property
    def content_key(self) -> str:
        """Names the bytes of the shards in a cache; shards without digests are told apart by where they lie."""
        return f"{self.fingerprint} {self.shard_directory}"

    def shard_path(self, shard: int) -> Path | str:
        """The tar of shard number ``shard`` (in pool order); a URL where the shards are remote."""
        name = f"{self.shard_names[shard]}.tar"
        return self.shard_directory / name if isinstance(self.shard_directory, Path) else join(self.shard_directory, name)

    def file_path(self, name: str) -> Path | str:
        """Where to read a file of the pool's directory: the local copy of index and tokenizer, else in place."""
        if name in (INDEX_FILE, TOKENIZER_FILE):
            return self._local / name
        return self.directory / name if isinstance(self.directory, Path) else join(self.directory, name)

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

    def _verify_digests(self, digests: Mapping[str, str]) -> None:
        for name, expected in digests.items():
            path = self._local / name
            found = sha256_file(path) if path.is_file() else "missing"
            if found != expected:
                raise UserError(
                    f"pool {self.directory}: {name} is not the one the pool was made with (SHA-256 "
                    f"{found}, {POOL_FILE} says {expected}); restore it or make the pool again"
                )


def _reopen(directory: Path | str, remote: RemoteSettings, options: Mapping[str, Mapping[str, Any]]) -> PoolIndex:
    if options:
        configure_storage(options)
    return PoolIndex.open(directory, False, remote)


def _resolve(directory: Path | str, shard_directory: str) -> Path | str:
    """Where the shards of the pool in ``directory`` lie; a ``Path`` if on a local file system."""
    if is_remote(shard_directory):
        return shard_directory.rstrip("/")
    if isinstance(directory, Path) or os.path.isabs(shard_directory):
        return Path(directory) / shard_directory
    return directory if shard_directory == "." else join(directory, shard_directory)


def _read_description(directory: Path | str) -> bytes:
    """Content of ``pool.json``."""
    if isinstance(directory, Path) and not directory.is_dir():
        raise UserError(f"there is no pool at {directory}: no such directory; make one with tools/preprocess_dclm.py")
    try:
        return read_all(join(directory, POOL_FILE))
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not a pool: it has no {POOL_FILE}; make a pool with tools/preprocess_dclm.py, "
            "or index existing token shards with tools/index_pool.py"
        ) from None


def _parse_facts(directory: Path | str, content: bytes) -> dict[str, Any]:
    path = join(directory, POOL_FILE)
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; make the pool again") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path} is not the description of a pool: its format is not {FORMAT!r}")
    if facts.get("version") != VERSION:
        raise UserError(f"{path} has version {facts.get('version')!r}, this package reads {VERSION}; make the pool again")
    expected = {"num_samples", "num_tokens", "shards", "index_sha256", "digest", *(field.name for field in dataclasses.fields(PoolFacts))}
    missing = expected - set(facts)
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}; make the pool again")
    digest = description_digest(facts)
    if digest != facts["digest"]:
        raise UserError(f"{path} is damaged: its content has digest {digest}, it says {facts['digest']}; restore it or make the pool again")
    if not isinstance(facts["shard_directory"], str):
        raise UserError(f"{path} is damaged: shard_directory is {facts['shard_directory']!r}; say where the shards lie")
    if facts["num_samples"] == 0:
        raise UserError(f"pool {directory} is empty: it has no sample")
    return facts


def _map_columns(directory: Path | str, local: Path, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    path, num_samples = local / INDEX_FILE, facts["num_samples"]
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
