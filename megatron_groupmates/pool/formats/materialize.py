"""Writing selected samples as real shards: a pool of its own, in DCLM's layout."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.kept_records import keep_record, kept_path, load_record
from megatron_groupmates.pool.formats.subset import Subset
from megatron_groupmates.pool.index import (
    POOL_FILE,
    TOKENIZER_FILE,
    PoolFacts,
    PoolIndex,
    ShardRecord,
    write_index,
    write_manifest,
)
from megatron_groupmates.pool.preprocess.work import differences
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.sources import read_sources, write_sources
from megatron_groupmates.pool.workers import run_tasks
from megatron_groupmates.pool.writer import shard_name, write_shard
from megatron_groupmates.utils.files import sha256_bytes, write_bytes
from megatron_groupmates.utils.progress import progress_bar

_TOOL = "export_pool"
_WORK_DIRECTORY = "export_pool.work"
_READ_ROWS = 256
ROWS_PER_SHARD = 8192


def materialize(subset: Subset, output: Path, member_format: str, rows_per_shard: int = ROWS_PER_SHARD, num_workers: int = 0) -> PoolIndex:
    """Write the samples of ``subset``, in the pool's order, as a pool in ``output``.

    The bytes depend on the samples, ``member_format`` and ``rows_per_shard`` alone. Shards are complete or absent; a
    killed run continues, writing only those that are not. A second call with the same arguments writes nothing.

    Args:
        subset: what to write.
        output: local directory, empty or with an unfinished run of the same export.
        member_format: ``raw`` or ``json.gz``.
        rows_per_shard: samples in every shard but the last.
        num_workers: processes that write, 0 to write in this one.

    Raises:
        UserError: a sample cannot be read, or ``output`` holds something else.
        OSError: it cannot be written.
    """
    arguments = {
        **{name: value for name, value in subset.source.items() if name != "pool"},  # not where it happens to lie
        "rows_sha256": sha256_bytes(np.packbits(subset.mask).tobytes()),
        "member_format": member_format,
        "rows_per_shard": rows_per_shard,
    }
    made_by = {"tool": _TOOL, "arguments": arguments}
    if (output / POOL_FILE).exists():
        return _open_present(output, made_by)
    work = output / _WORK_DIRECTORY
    work.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob("shard_*.tmp-*"):  # of a killed run
        leftover.unlink(missing_ok=True)
    rows = np.flatnonzero(subset.mask)
    parts = [(number, rows[first : first + rows_per_shard]) for number, first in enumerate(range(0, len(rows), rows_per_shard))]
    stamp = json.dumps(arguments, sort_keys=True)
    _refuse_other_shards(output, stamp)
    context = _Context(subset.index, output, member_format, stamp)
    with progress_bar(len(rows), "write shards", unit="sample") as bar:
        run_tasks(_write_shard, context, parts, num_workers, on_advance=bar.update, on_done=lambda: None)
    kept = [load_record(work, shard_name(number), stamp) for number, _ in parts]
    _write_pool(subset, output, member_format, [found[0] for found in kept if found is not None], made_by)
    shutil.rmtree(work)
    return PoolIndex.open(output)


def _refuse_other_shards(output: Path, stamp: str) -> None:
    """Shards of another export that did not end would lie among those of this one."""
    work = output / _WORK_DIRECTORY
    names = [path.stem for path in output.glob("shard_*.tar")]
    others = [name for name in names if kept_path(work, name).exists() and load_record(work, name, stamp) is None]
    if others:
        raise UserError(f"{output} holds {len(others)} shards that another export left unfinished; remove them or choose another --output")


@dataclasses.dataclass(frozen=True)
class _Context:
    index: PoolIndex
    output: Path
    member_format: str
    stamp: str


def _write_shard(context: _Context, part: tuple[int, np.ndarray], advance: Callable[[int], None]) -> None:
    """Write a shard with its sources and keep its record, unless an earlier run did."""
    number, rows = part
    index, output, work, name = context.index, context.output, context.output / _WORK_DIRECTORY, shard_name(number)
    kept = load_record(work, name, context.stamp)
    path = output / f"{name}.tar"
    if kept is not None and path.is_file() and path.stat().st_size == kept[0].num_bytes:
        advance(len(rows))
        return
    sources = list(_sources_of(index, rows))
    if len(sources) == len(rows):
        write_sources(output, name, sources)
    record = write_shard(output, number, _read(index, rows, advance), index.token_dtype, context.member_format)
    keep_record(work, record, context.stamp, {})


def _read(index: PoolIndex, rows: np.ndarray, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    reader = PoolReader(index)
    for first in range(0, len(rows), _READ_ROWS):
        block = reader.read_many(rows[first : first + _READ_ROWS])
        yield from block
        advance(len(block))
    reader.close()


def _sources_of(index: PoolIndex, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Sources of the samples, as far as the pool has them."""
    shards, rows_in_shard = index.locate(rows)
    for shard, group in itertools.groupby(zip(shards.tolist(), rows_in_shard.tolist(), strict=True), key=lambda pair: pair[0]):
        wanted = {row for _, row in group}
        for row, source in enumerate(read_sources(index, index.shard_names[shard])):
            if row in wanted:
                yield source


def _write_pool(subset: Subset, output: Path, member_format: str, records: list[ShardRecord], made_by: dict[str, Any]) -> None:
    index = subset.index
    write_bytes(output / TOKENIZER_FILE, Path(index.file_path(TOKENIZER_FILE)).read_bytes())
    facts = PoolFacts(
        member_format=member_format,
        token_dtype=index.token_dtype,
        vocab_size=index.vocab_size,
        eot_id=index.eot_id,
        tokenizer=index.tokenizer,
        kinds=index.kinds,
        made_by=made_by,
    )
    write_manifest(output, records)
    write_index(output, facts, records, index.kind_of[subset.mask])


def _open_present(output: Path, made_by: dict[str, Any]) -> PoolIndex:
    index = PoolIndex.open(output)
    present = index.facts["made_by"]
    if present != made_by:
        how = differences({"tool": present.get("tool"), **present.get("arguments", {})}, {"tool": _TOOL, **made_by["arguments"]})
        raise UserError(f"{output} is a pool already, made otherwise ({how}); choose another --output")
    return index
