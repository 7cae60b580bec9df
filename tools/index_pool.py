#!/usr/bin/env python
"""Make existing token shards a pool, without rewriting them.

    python tools/index_pool.py --shards DIRECTORY --tokenizer EleutherAI/gpt-neox-20b
    python tools/index_pool.py --shards s3://bucket/tokenized --output POOL --tokenizer EleutherAI/gpt-neox-20b

SHARDS is one of

  a directory, local or a URL, of DCLM's or open_lm's tokenised tars with manifest.jsonl (final newline or not),
  a Megatron-Energon data set (.nv-meta/.info.json says which shards),
  a directory of WebDataset tars, searched to any depth, or
  a wids index (a .json file), whose shards may lie elsewhere.

One pass over the bytes of each shard finds where its samples lie, how long they are, and its SHA-256, and checks every
id against the tokenizer. Samples are the members *.json.gz (gzip of a JSON list of ids) or *.bin (little-endian ids, as
this package writes them); other members are counted and left out. Where several could hold the ids, choose by
--member-suffix. The index (pool.json, index.bin, tokenizer.json) goes beside the shards, or to --output. Shards that
are listed and not there are an error; tars that are not listed are reported and left out. A killed run continues when
the command is repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.existing import IndexReport, index_existing
from megatron_groupmates.pool.formats.shard_lists import enumerate_names
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.arguments import add_storage_options, add_workers, use_storage_options


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, metavar="SHARDS", help="directory or URL of the shards, or a wids index")
    parser.add_argument("--output", metavar="POOL", help="local directory for the index (default: beside the shards)")
    parser.add_argument(
        "--tokenizer", required=True, metavar="T", help="that made the ids: a tokenizer.json, a directory with one, or a Hugging Face name"
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="token after each document (default: the tokenizer's end-of-sequence token, else <|endoftext|>)"
    )
    parser.add_argument(
        "--member-suffix", metavar="S", help="ending of the members with the ids, such as json.gz or tokens.bin (default: the one there is)"
    )
    add_storage_options(parser)
    add_workers(parser, "read shards")
    return parser.parse_args(arguments)


def describe(report: IndexReport, output: str) -> str:
    """The report in words."""
    lines = [
        f"indexed {output}" if report.built else f"{output} is a pool already: nothing to do",
        f"  {report.num_shards:,} shards, {report.num_samples:,} samples, {report.num_tokens:,} tokens",
    ]
    for names, what in (
        (report.extra, "not listed, left out"),
        (report.repeated, "listed twice, used once"),
        (report.empty, "without a sample, left out"),
    ):
        if names:
            lines.append(f"  {len(names)} shards {what}: {enumerate_names(names)}")
    for suffix, count in sorted(report.ignored.items()):
        lines.append(f"  {count:,} members without ids left out: {f'.{suffix}' if suffix else 'names without a dot'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    output = args.output or (os.path.dirname(args.shards) or "." if args.shards.endswith(".json") else args.shards)
    try:
        use_storage_options(args)
        tokenizer = PoolTokenizer.load(args.tokenizer, args.eot)
        report = index_existing(args.shards, output, tokenizer, args.workers, args.member_suffix)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(report, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
