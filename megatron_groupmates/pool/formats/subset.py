"""What is exported: a pool, or the samples of it that a generation selects."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.archive import read_keys
from megatron_groupmates.pool.generation import generation_name, load_generation, read_pointer
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import read_sealed_json, sealed, write_json

EXPORT_FILE = "export.json"
_FORMAT = "megatron_groupmates export"
_VERSION = 1
_MAX_PLAIN_NAME = 99


@dataclasses.dataclass(frozen=True)
class Subset:
    """Samples of a pool.

    Attributes:
        index: the pool.
        mask: bool[num_samples], True where the sample is exported.
        source: JSON values that say where the selection comes from: pool, fingerprint, generation, digest.
    """

    index: PoolIndex
    mask: np.ndarray
    source: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """Samples exported."""
        return int(np.count_nonzero(self.mask))

    @property
    def num_tokens(self) -> int:
        """Their tokens."""
        return int(self.index.lengths[self.mask].sum(dtype=np.int64))

    @property
    def selected_per_shard(self) -> np.ndarray:
        """int64[num_shards]."""
        return np.add.reduceat(self.mask, self.index.first_row[:-1], dtype=np.int64)

    def shard_mask(self, shard: int) -> np.ndarray:
        """bool[rows of the shard]."""
        return self.mask[self.index.first_row[shard] : self.index.first_row[shard + 1]]

    def partial_shards(self) -> list[str]:
        """Names of shards that are selected in part."""
        selected = self.selected_per_shard
        partial = np.flatnonzero((selected > 0) & (selected < self.index.rows_per_shard))
        return [self.index.shard_names[shard] for shard in partial]


def open_subset(pool: Path | str, generation: Path | str | None) -> Subset:
    """The samples to export.

    Args:
        pool: directory of the pool.
        generation: ``DIR/generation-000003``, or ``DIR:3``, or ``DIR`` for the newest in a selection directory; None
            for the whole pool.

    Raises:
        UserError: the pool or the generation cannot be opened, or they do not belong together.
    """
    index = PoolIndex.open(pool)
    source: dict[str, Any] = {
        "pool": str(index.directory),
        "pool_fingerprint": index.fingerprint,
        "generation": None,
        "generation_digest": None,
    }
    if generation is None:
        return Subset(index, np.ones(index.num_samples, dtype=bool), source)
    directory, number = parse_generation(generation)
    loaded = load_generation(directory, number, index)
    return Subset(index, loaded.mask, {**source, "generation": generation_name(number), "generation_digest": loaded.digest})


def parse_generation(generation: Path | str) -> tuple[Path, int]:
    """(selection directory, number) of a generation given as for :func:`open_subset`.

    Raises:
        UserError: it names none.
    """
    text = str(generation).rstrip("/")
    for pattern in (r"(?P<directory>.*):(?P<number>\d+)", r"(?:(?P<directory>.*)/)?generation-(?P<number>\d{6,})"):
        match = re.fullmatch(pattern, text)
        if match:
            return Path(match["directory"] or "."), int(match["number"])
    number = read_pointer(text)
    if number is None:
        raise UserError(f"{text} names no generation: no {generation_name(3)}, no DIRECTORY:3, nor a selection directory with a newest one")
    return Path(text), number


def write_export(directory: Path, kind: str, subset: Subset, suffix: str, facts: dict[str, Any]) -> None:
    """Write ``export.json``, the last file of an export: which samples of which pool it serves, and how.

    Args:
        directory: of the export.
        kind: its format, such as ``webdataset``.
        subset: what it serves.
        suffix: of the members with the ids.
        facts: JSON values of this kind of export.
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        **subset.source,
        "num_samples": subset.num_samples,
        "num_tokens": subset.num_tokens,
        "tokenizer": subset.index.tokenizer,
        "member_format": subset.index.member_format,
        "member_suffix": suffix,
        "token_dtype": subset.index.token_dtype,
        **facts,
    }
    write_json(directory / EXPORT_FILE, sealed(content))


def read_export(directory: Path | str, kind: str) -> dict[str, Any]:
    """The facts of an export of this kind.

    Raises:
        UserError: there is none, it is damaged, or it is of another kind or version.
    """
    path = Path(directory) / EXPORT_FILE
    if not path.is_file():
        raise UserError(f"{directory} is not an export: it has no {EXPORT_FILE}; make one with tools/export_pool.py")
    facts = read_sealed_json(path, "an export", _FORMAT, _VERSION, "make the export again")
    if facts["kind"] != kind:
        raise UserError(f"{directory} is an export for {facts['kind']}, not for {kind}")
    return facts


def shard_url(index: PoolIndex, shard: int, output: Path) -> str:
    """Where an export in ``output`` finds a shard: by its name alone if it lies there, else by absolute path or URL."""
    path = index.shard_path(shard)
    if storage.is_remote(path):
        return str(path)
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute, os.path.abspath(output))
    return absolute if inside.startswith("..") else inside


@dataclasses.dataclass(frozen=True)
class ShardKeys:
    """The samples of one shard as WebDataset and Energon see them, which may be more than the pool's.

    Attributes:
        keys: of all samples, in order.
        row_of: int64[number of keys], row in the pool's shard of each, -1 where the pool has none.
        starts: int64[number of keys + 1], byte at which each sample begins, and at which the last one ends.
        suffix: of the members with the ids, such as ``json.gz``.
        plain_names: whether every member's name fits into its header's own field, less a byte.
    """

    keys: list[str]
    row_of: np.ndarray
    starts: np.ndarray
    suffix: str
    plain_names: bool

    @property
    def num_foreign(self) -> int:
        """Samples that the pool has not."""
        return int(np.count_nonzero(self.row_of < 0))

    @property
    def repeated(self) -> list[str]:
        """Keys of more than one sample."""
        return [key for key, count in collections.Counter(self.keys).items() if count > 1]


def shard_keys(index: PoolIndex, shard: int) -> ShardKeys:
    """Read the headers of a shard.

    Raises:
        UserError: the shard is not the one that the index describes, or its names are no WebDataset names.
        OSError: it cannot be read.
    """
    path = index.shard_path(shard)
    try:
        with storage.open_input(path) if storage.is_remote(path) else open(path, "rb", buffering=0) as file:
            found = read_keys(file)
    except ValueError as error:
        raise UserError(f"shard {path} cannot be read: {error}; restore it") from error
    rows = slice(int(index.first_row[shard]), int(index.first_row[shard + 1]))
    row_of = np.full(len(found.keys), -1, dtype=np.int64)
    suffixes = set()
    for row, offset in enumerate(index.offsets[rows].tolist()):
        sample, suffix = found.sample_at.get(offset, (-1, ""))
        if sample < 0:
            raise UserError(
                f"shard {path}, row {row}: its member has a name that WebDataset passes over (it needs a key, a dot and an ending); "
                "export with --materialize, which writes shards with good names"
            )
        if row_of[sample] >= 0:
            raise UserError(
                f"shard {path}, rows {row_of[sample]} and {row}: both have the key {found.keys[sample]!r}, which makes one sample of them; "
                "export with --materialize, which writes shards with keys of their own"
            )
        row_of[sample] = row
        suffixes.add(suffix)
    assert len(suffixes) == 1, "a pool has one sort of members"
    plain = found.num_extended == 0 and found.longest_name <= _MAX_PLAIN_NAME
    return ShardKeys(found.keys, row_of, np.array(found.starts, dtype=np.int64), suffixes.pop(), plain)
