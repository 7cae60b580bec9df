"""Token shards made by other tools, indexed as a pool without rewriting them."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.kept_records import keep_record, load_record
from megatron_groupmates.pool.formats.scan import FORMAT_OF_ENDING, ScannedShard, ScanOptions, member_format, scan_shard
from megatron_groupmates.pool.formats.shard_lists import ShardList, enumerate_names, list_shards
from megatron_groupmates.pool.index import POOL_FILE, TOKENIZER_FILE, PoolFacts, PoolIndex, ShardRecord, write_index
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.workers import run_tasks
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import write_bytes
from megatron_groupmates.utils.progress import progress_bar

_TOOL = "index_pool"
_WORK_DIRECTORY = "index_pool.work"


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What was found.

    Attributes:
        num_shards, num_samples, num_tokens: in the pool.
        extra: tars that the list of shards does not name; left out, as they may be unfinished.
        repeated: shards listed more than once; used once.
        empty: shards without a sample; left out.
        ignored: number of members that hold no ids, by suffix.
        built: False where the pool was there already; the lists are then empty.
    """

    num_shards: int
    num_samples: int
    num_tokens: int
    extra: list[str]
    repeated: list[str]
    empty: list[str]
    ignored: dict[str, int]
    built: bool


def index_existing(
    source: Path | str,
    output: Path | str,
    tokenizer: PoolTokenizer,
    num_workers: int = 0,
    member_suffix: str | None = None,
) -> IndexReport:
    """Make existing token shards a pool, by one pass over their bytes.

    What was read is kept in ``<output>/index_pool.work``, so that a killed run continues; a run that ends removes it.

    Args:
        source: as in :func:`megatron_groupmates.pool.formats.shard_lists.list_shards`. Members are ``.json.gz`` (gzip of a JSON
            list of ids) or ``.bin`` (little-endian ids, 16-bit where the vocabulary fits); others are left out.
        output: where the index goes; the directory of the shards or another local one, from which the shards are
            referred to by absolute path or URL.
        tokenizer: that made the ids.
        num_workers: processes that read shards, 0 to do it in this one.
        member_suffix: of the members that hold the ids, such as ``json.gz`` or ``tokens.bin``; None to find it.

    Raises:
        UserError: a shard that is listed is missing, damaged, or has not the number of samples listed; an id is
            outside the tokenizer's vocabulary; it is not clear which members hold the ids; there are no shards; or
            ``output`` is a pool made otherwise.
        OSError: a shard cannot be read, or the index cannot be written.
    """
    if storage.is_remote(output):
        raise UserError(f"an index cannot be written to {output}; name a local directory with --output (the shards stay where they are)")
    if num_workers < 0:
        raise UserError(f"--workers {num_workers} should be at least 0")
    output = Path(output).resolve()
    shards = list_shards(source)
    if (output / POOL_FILE).exists():
        return _check_present(shards, output, tokenizer)
    suffix = None if member_suffix is None else member_suffix.removeprefix(".")
    if suffix is not None and member_format(suffix) is None:
        raise UserError(f"--member-suffix {member_suffix!r} should end in {' or '.join(FORMAT_OF_ENDING)}: no other members are read")
    options = ScanOptions(tokenizer.vocab_size, tokenizer.token_dtype, suffix)
    scanned = _scan_all(shards, options, output / _WORK_DIRECTORY, num_workers)
    _check_counts(shards, scanned)
    records = [shard.record for shard in scanned if len(shard.record.lengths)]
    if not records:
        raise UserError(f"the shards in {shards.directory} have no sample")
    _write(shards, output, tokenizer, records, _common_format(shards, scanned))
    shutil.rmtree(output / _WORK_DIRECTORY)
    ignored: collections.Counter[str] = collections.Counter()
    for shard in scanned:
        ignored.update(shard.ignored)
    return IndexReport(
        len(records),
        sum(len(record.lengths) for record in records),
        sum(int(record.lengths.sum(dtype=np.int64)) for record in records),
        extra=shards.extra,
        repeated=shards.repeated,
        empty=[shard.record.name for shard in scanned if not len(shard.record.lengths)],
        ignored=dict(ignored),
        built=True,
    )


@dataclasses.dataclass(frozen=True)
class _Context:
    shards: ShardList
    options: ScanOptions
    work: Path


def _scan_all(shards: ShardList, options: ScanOptions, work: Path, num_workers: int) -> list[ScannedShard]:
    """All shards, sorted by name; those read by a killed run are taken from ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    names = sorted(shards.counts)
    context = _Context(shards, options, work)
    with progress_bar(len(names), "index shards", unit="shard") as bar:
        run_tasks(_scan, context, names, num_workers, on_advance=lambda amount: None, on_done=bar.update)
    found = [_load(context, name) for name in names]
    changed = [name for name, shard in zip(names, found, strict=True) if shard is None]
    if changed:
        raise UserError(f"shards changed while they were read: {enumerate_names(changed)}; index them when they are complete")
    return [shard for shard in found if shard is not None]


def _scan(context: _Context, name: str, advance: Callable[[int], None]) -> None:
    if _load(context, name) is None:
        stamp = _stamp(context, name)  # of the shard as it is before it is read
        shard = scan_shard(context.shards.path(name), name, context.options)
        more = {"suffix": shard.suffix, "ignored": shard.ignored}
        keep_record(context.work, shard.record, stamp, more)


def _load(context: _Context, name: str) -> ScannedShard | None:
    kept = load_record(context.work, name, _stamp(context, name))
    return None if kept is None else ScannedShard(kept[0], kept[1]["suffix"], kept[1]["ignored"])


def _stamp(context: _Context, name: str) -> str:
    path = context.shards.path(name)
    return json.dumps([path, _version(path), *dataclasses.astuple(context.options)])


def _version(path: str) -> list[int | None]:
    """Size and, of a local file, time of the last change: what tells that a shard is still the one that was read."""
    changed = None if storage.is_remote(path) else os.stat(path).st_mtime_ns
    return [storage.file_size(path), changed]


def _check_counts(shards: ShardList, scanned: list[ScannedShard]) -> None:
    for shard in scanned:
        expected = shards.counts[shard.record.name]
        if expected is not None and expected != len(shard.record.lengths):
            raise UserError(
                f"shard {shards.path(shard.record.name)} has {len(shard.record.lengths)} samples, the manifest says {expected}; "
                f"fetch it again, or correct {shards.said_by}"
            )


def _common_format(shards: ShardList, scanned: list[ScannedShard]) -> str:
    first: dict[str, str] = {}
    for shard in scanned:
        if shard.suffix:
            first.setdefault(shard.suffix, shard.record.name)
    if len(first) > 1:
        found = ", ".join(f".{suffix} in {name}" for suffix, name in sorted(first.items()))
        raise UserError(f"the shards in {shards.directory} hold ids in different members: {found}; choose one with --member-suffix")
    found_format = member_format(next(iter(first)))
    assert found_format is not None
    return found_format


def _write(shards: ShardList, output: Path, tokenizer: PoolTokenizer, records: list[ShardRecord], found_format: str) -> None:
    write_bytes(output / TOKENIZER_FILE, tokenizer.content)
    facts = PoolFacts(
        member_format=found_format,
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer={"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        kinds=[],
        made_by={"tool": _TOOL, "arguments": {"shards": shards.said_by or shards.directory}},
        shard_directory=_shard_directory(shards, output),
    )
    num_samples = sum(len(record.lengths) for record in records)
    write_index(output, facts, records, np.full(num_samples, -1, dtype=np.int16))


def _shard_directory(shards: ShardList, output: Path) -> str:
    if storage.is_remote(shards.directory):
        return shards.directory
    directory = Path(shards.directory).resolve()
    return "." if directory == output else str(directory)


def _check_present(shards: ShardList, output: Path, tokenizer: PoolTokenizer) -> IndexReport:
    index = PoolIndex.open(output)
    found, expected = index.facts["shard_directory"], _shard_directory(shards, output)
    if found != expected:
        raise UserError(f"{output} is a pool already, with its shards in {found}, not {expected}; choose another --output")
    if index.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{output} is a pool already, with tokenizer {index.tokenizer['name']} (SHA-256 "
            f"{index.tokenizer['fingerprint']}), not {tokenizer.name} ({tokenizer.fingerprint}); choose "
            "another --output"
        )
    return IndexReport(index.num_shards, index.num_samples, index.num_tokens, [], [], [], {}, built=False)
