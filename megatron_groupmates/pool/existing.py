"""Token shards made by DCLM's or open_lm's own tools, indexed as a pool without rewriting them."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import (
    MANIFEST_FILE,
    POOL_FILE,
    TOKENIZER_FILE,
    PoolFacts,
    PoolIndex,
    ShardRecord,
    write_index,
)
from megatron_groupmates.pool.reader import decode_json_member
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.files import sha256_file, write_bytes
from megatron_groupmates.utils.progress import progress_bar

_TOOL = "index_pool"


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What was found.

    Attributes:
        num_shards, num_samples, num_tokens: in the pool.
        extra: tars that the manifest does not list; left out, as they may be unfinished.
        repeated: shards listed more than once; used once.
        empty: shards without a sample; left out.
        built: False where the pool was there already; the lists are then empty.
    """

    num_shards: int
    num_samples: int
    num_tokens: int
    extra: list[str]
    repeated: list[str]
    empty: list[str]
    built: bool


def index_existing(directory: Path | str, output: Path | str, tokenizer: PoolTokenizer, num_workers: int = 0) -> IndexReport:
    """Make the token shards in ``directory`` a pool, by one pass over them.

    Args:
        directory: has ``*.tar`` with members ``*.json.gz`` (gzip of a JSON list of ids) and perhaps ``manifest.jsonl``,
            with or without a final newline.
        output: where the index goes; ``directory`` itself or another place, from which the shards are referred to by
            absolute path.
        tokenizer: that made the ids.
        num_workers: processes that read shards, 0 to do it in this one.

    Raises:
        UserError: a shard of the manifest is missing, damaged, or has not the number of samples listed; an id is
            outside the tokenizer's vocabulary; there are no shards; or ``output`` is a pool made otherwise.
        OSError: the index cannot be written.
    """
    directory, output = Path(directory).resolve(), Path(output).resolve()
    if (output / POOL_FILE).exists():
        return _check_present(directory, output, tokenizer)
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; check the path")
    listed, repeated = _read_manifest(directory / MANIFEST_FILE)
    present = {path.name.removesuffix(".tar") for path in directory.glob("*.tar")}
    names = sorted(present if listed is None else listed)
    if not names:
        raise UserError(f"{directory} has no token shards: no *.tar files, and no {MANIFEST_FILE} that lists any")
    missing = [name for name in names if not (directory / f"{name}.tar").is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} shards of {directory / MANIFEST_FILE} are missing: "
            f"{_enumerate(missing)}; fetch them, or take their lines out of the manifest"
        )
    records = _read_shards(directory, names, tokenizer.vocab_size, num_workers)
    for record in records:
        expected = None if listed is None else listed[record.name]
        if expected is not None and expected != len(record.lengths):
            raise UserError(
                f"shard {directory / record.name}.tar has {len(record.lengths)} samples, the manifest says {expected}; fetch it again"
            )
    shards = [record for record in records if len(record.lengths)]
    _write(directory, output, tokenizer, shards)
    num_samples = sum(len(shard.lengths) for shard in shards)
    return IndexReport(
        len(shards),
        num_samples,
        sum(int(shard.lengths.sum(dtype=np.int64)) for shard in shards),
        extra=sorted(present - set(names)),
        repeated=repeated,
        empty=[record.name for record in records if not len(record.lengths)],
        built=True,
    )


def read_shard(directory: Path, vocab_size: int, name: str) -> ShardRecord:
    """Index one existing shard.

    Raises:
        UserError: it is not a tar of ``*.json.gz`` members, is damaged, or has an id outside the vocabulary.
    """
    path = directory / f"{name}.tar"
    offsets, member_bytes, lengths = [], [], []
    try:
        for row, (info, content) in enumerate(_members(path)):
            tokens = decode_json_member(content)
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(
                    f"row {row} has ids from {tokens.min()} to {tokens.max()}, but the tokenizer's "
                    f"vocabulary has {vocab_size}: name the one that made the shards with --tokenizer"
                )
            offsets.append(info.offset_data)
            member_bytes.append(info.size)
            lengths.append(len(tokens))
    except (tarfile.TarError, ValueError, OSError) as error:
        raise UserError(f"shard {path} cannot be indexed: {error}") from error
    return ShardRecord(
        name,
        np.array(offsets, dtype=np.uint64),
        np.array(member_bytes, dtype=np.uint32),
        np.array(lengths, dtype=np.int32),
        path.stat().st_size,
        sha256_file(path),
    )


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    end = 0
    with open(path, "rb") as shard, tarfile.open(fileobj=shard, mode="r:") as tar:
        for info in tar:
            end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not info.isfile():
                continue
            if not info.name.endswith(".json.gz"):
                raise ValueError(f"member {info.name!r} is not a .json.gz of token ids")
            file = tar.extractfile(info)
            assert file is not None
            yield info, file.read()
        # The library takes a damaged or missing header for the end of the archive.
        shard.seek(end)
        if shard.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"the archive is damaged or ends early, at byte {end}")


def _read_shards(directory: Path, names: list[str], vocab_size: int, num_workers: int) -> list[ShardRecord]:
    read = partial(read_shard, directory, vocab_size)
    with progress_bar(len(names), "index shards", unit="shard") as bar:
        records = []
        if num_workers == 0:
            for record in map(read, names):
                records.append(record)
                bar.update()
            return records
        # Spawned, not forked: the tokenizer's threads do not survive a fork.
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as executor:
            for record in executor.map(read, names):
                records.append(record)
                bar.update()
        return records


def _read_manifest(path: Path) -> tuple[dict[str, int | None] | None, list[str]]:
    """(shard name to number of samples where it says one, names listed again); (None, []) without a manifest."""
    if not path.is_file():
        return None, []
    listed: dict[str, int | None] = {}
    repeated = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
            name = entry["shard"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number} is not an object with "shard": {line[:80]!r}') from error
        if name in listed:
            repeated.append(name)
        listed[name] = entry.get("num_sequences", entry.get("num_chunks"))
    return listed, repeated


def _write(directory: Path, output: Path, tokenizer: PoolTokenizer, shards: list[ShardRecord]) -> None:
    if not shards:
        raise UserError(f"the shards in {directory} have no sample")
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / TOKENIZER_FILE, tokenizer.content)
    facts = PoolFacts(
        member_format="json.gz",
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer={"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        kinds=[],
        made_by={"tool": _TOOL, "arguments": {"shards": str(directory)}},
        shard_directory="." if output == directory else str(directory),
    )
    num_samples = sum(len(shard.lengths) for shard in shards)
    write_index(output, facts, shards, np.full(num_samples, -1, dtype=np.int16))


def _check_present(directory: Path, output: Path, tokenizer: PoolTokenizer) -> IndexReport:
    index = PoolIndex.open(output)
    if (output / index.facts["shard_directory"]).resolve() != directory:
        raise UserError(
            f"{output} is a pool already, with its shards in {output / index.facts['shard_directory']}, "
            f"not {directory}; choose another --output"
        )
    if index.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{output} is a pool already, with tokenizer {index.tokenizer['name']} (SHA-256 "
            f"{index.tokenizer['fingerprint']}), not {tokenizer.name} ({tokenizer.fingerprint}); choose "
            "another --output"
        )
    return IndexReport(index.num_shards, index.num_samples, index.num_tokens, [], [], [], built=False)


def _enumerate(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
