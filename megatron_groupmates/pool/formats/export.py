"""One call for every export: the selection as it is, or written as shards first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats import energon, open_lm, webdataset, wids
from megatron_groupmates.pool.formats.materialize import ROWS_PER_SHARD, materialize
from megatron_groupmates.pool.formats.subset import EXPORT_FILE, Subset, open_subset, read_export
from megatron_groupmates.pool.index import POOL_FILE
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.progress import progress_bar

FORMATS: dict[str, Callable[..., None]] = {
    webdataset.KIND: webdataset.export_webdataset,
    wids.KIND: wids.export_wids,
    energon.KIND: energon.export_energon,
    open_lm.KIND: open_lm.export_open_lm,
}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export serves: its samples, their tokens, and the shards they lie in."""

    num_samples: int
    num_tokens: int
    num_shards: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export.

    Attributes:
        kind: a key of ``FORMATS``.
        materialize: write the selected samples as shards first.
        member_format: of these shards, ``raw`` or ``json.gz``; None for what the kind of export reads best.
        rows_per_shard: samples in each of these shards.
        max_excludes: most samples that an Energon split file may leave out one by one.
        num_workers: processes that write shards, 0 to write in this one.
        work: local directory in which an export to an object store is built first.

    Raises:
        UserError: a value is out of range.
    """

    kind: str
    materialize: bool = False
    member_format: str | None = None
    rows_per_shard: int = ROWS_PER_SHARD
    max_excludes: int = energon.MAX_EXCLUDES
    num_workers: int = 0
    work: Path | str | None = None

    def __post_init__(self) -> None:
        if self.kind not in FORMATS:
            raise UserError(f"--format {self.kind!r} should be one of {', '.join(sorted(FORMATS))}")
        for name, value, least in (
            ("--samples-per-shard", self.rows_per_shard, 1),
            ("--max-excludes", self.max_excludes, 0),
            ("--workers", self.num_workers, 0),
        ):
            if value < least:
                raise UserError(f"{name} {value} should be at least {least}")


def export_pool(pool: Path | str, generation: Path | str | None, output: Path | str, options: ExportOptions) -> ExportReport:
    """Export a pool, or what a generation selects of it. Nothing is written into the pool.

    A killed export is made by the same call again.

    Args:
        pool: directory of the pool.
        generation: as for :func:`megatron_groupmates.pool.formats.subset.open_subset`.
        output: directory of the export; a URL for a materialised one.
        options: see :class:`ExportOptions`.

    Raises:
        UserError: the export would serve samples that were not selected, or its reader could not read them; ``output``
            is the pool or another export; pool or generation cannot be opened.
        OSError: a shard cannot be read or the export not written.
    """
    subset = open_subset(pool, generation)
    directory = _local_directory(output, options)
    _check_output(subset, directory, options)
    if options.kind == open_lm.KIND:
        open_lm.refuse_lengths(subset)
    if options.materialize:
        member_format = options.member_format or _best_member_format(subset, options.kind)
        index = materialize(subset, directory, member_format, options.rows_per_shard, options.num_workers)
        subset = Subset(index, np.ones(index.num_samples, dtype=bool), subset.source)
    elif options.member_format is not None:
        raise UserError("--member-format says how --materialize writes shards; without it the pool's own are served as they are")
    more = (options.max_excludes,) if options.kind == energon.KIND else ()
    FORMATS[options.kind](subset, directory, *more)
    if storage.is_remote(output):
        _upload(directory, str(output))
    return ExportReport(subset.num_samples, subset.num_tokens, int(np.count_nonzero(subset.selected_per_shard)))


def _best_member_format(subset: Subset, kind: str) -> str:
    """wids and open_lm decode ``.json.gz`` by themselves, and open_lm nothing else."""
    return "json.gz" if kind in (wids.KIND, open_lm.KIND) else subset.index.member_format


def _local_directory(output: Path | str, options: ExportOptions) -> Path:
    if not storage.is_remote(output):
        return Path(output)
    if not options.materialize or options.work is None:
        raise UserError(
            f"an export to {output} needs --materialize, as a store has no links to the pool's shards, and --work DIR, "
            "a local directory in which it is built first"
        )
    return Path(options.work)


def _check_output(subset: Subset, output: Path, options: ExportOptions) -> None:
    index = subset.index
    if output.resolve() in [place.resolve() for place in (index.directory, index.shard_directory) if isinstance(place, Path)]:
        raise UserError(f"--output {output} is the pool itself, into which an export writes nothing; choose another directory")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a directory")
    if (output / POOL_FILE).exists() and not options.materialize:
        raise UserError(f"--output {output} is a pool; choose another directory")
    if (output / EXPORT_FILE).exists():
        facts = read_export(output, options.kind)
        for name, value in subset.source.items():
            if name != "pool" and facts[name] != value:
                raise UserError(f"{output} is an export with {name} {facts[name]}, not {value}; choose another --output")


def _upload(directory: Path, output: str) -> None:
    """Copy a finished export to a store, the file that says it is whole last."""
    files = sorted((path for path in directory.rglob("*") if path.is_file()), key=lambda path: (path.name == EXPORT_FILE, path))
    with progress_bar(len(files), "upload", unit="file") as bar:
        for path in files:
            storage.upload(path, storage.join(output, path.relative_to(directory).as_posix()))
            bar.update()
