#!/usr/bin/env python
"""Export a pool, or the samples that a generation selects, to webdataset, wids, Megatron-Energon or open_lm.

    python tools/export_pool.py --pool POOL --generation RUN/selection --format webdataset --output EXPORT
    python tools/export_pool.py --pool POOL --generation RUN/selection:3 --format open_lm --materialize --output EXPORT

Nothing in the pool is changed. What an export is depends on what its reader can do:

  webdataset  a list of shards and a callback for WebDataset(select_files=...): exact for any selection.
              from megatron_groupmates.pool.formats.webdataset import open_export
              e = open_export("EXPORT"); WebDataset(e.urls, select_files=e.select_files).map(e.put_tokens)
  energon     .nv-meta, links to the shards and a split file that leaves out single samples: exact, but Energon takes
              about 10 s to read a million of these (--max-excludes). Give it EXPORT/metadataset.yaml, with the cooker
              megatron_groupmates.pool.formats.energon.token_cooker("EXPORT").
  wids        index.json of whole shards, for wids.ShardListDataset("EXPORT/index.json").
  open_lm     manifest.jsonl of whole .json.gz shards, for --dataset-manifest EXPORT/manifest.jsonl.

An export that would make its reader serve samples that were not selected is refused. --materialize writes the selected
samples as shards of their own (DCLM's layout, also a pool again), which every reader can have. A killed run continues
when the command is repeated. EXPORT/export.json says which pool and generation the export is of.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.energon import MAX_EXCLUDES
from megatron_groupmates.pool.formats.export import FORMATS, ExportOptions, export_pool
from megatron_groupmates.pool.formats.materialize import ROWS_PER_SHARD
from megatron_groupmates.pool.index import MEMBER_FORMATS
from megatron_groupmates.utils.arguments import add_storage_options, add_workers, use_storage_options


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="directory or URL of the pool")
    parser.add_argument(
        "--generation",
        metavar="G",
        help="what to export: a generation's directory, SELECTION_DIR:N, or SELECTION_DIR for the newest (default: the whole pool)",
    )
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="who reads the export")
    parser.add_argument("--output", required=True, metavar="EXPORT", help="directory of the export; a URL with --materialize and --work")
    parser.add_argument("--materialize", action="store_true", help="write the selected samples as shards of their own")
    parser.add_argument(
        "--member-format",
        choices=MEMBER_FORMATS,
        help="of shards that --materialize writes (default: json.gz for wids and open_lm, else as in the pool)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=ROWS_PER_SHARD,
        metavar="N",
        help="in materialised shards (default: %(default)s)",
    )
    parser.add_argument(
        "--max-excludes",
        type=int,
        default=MAX_EXCLUDES,
        metavar="N",
        help="most samples that an Energon split file may leave out one by one (default: %(default)s)",
    )
    parser.add_argument("--work", metavar="DIR", help="local directory in which an export to a URL is built first")
    add_storage_options(parser)
    add_workers(parser, "write shards")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        use_storage_options(args)
        options = ExportOptions(
            kind=args.format,
            materialize=args.materialize,
            member_format=args.member_format,
            rows_per_shard=args.samples_per_shard,
            max_excludes=args.max_excludes,
            num_workers=args.workers,
            work=args.work,
        )
        report = export_pool(args.pool, args.generation, args.output, options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported to {args.output} for {args.format}")
    print(f"  {report.num_shards:,} shards, {report.num_samples:,} samples, {report.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
