#!/usr/bin/env python
"""Make existing DCLM or open_lm token shards a pool, without rewriting them.

    python tools/index_pool.py --shards DIRECTORY --tokenizer EleutherAI/gpt-neox-20b

DIRECTORY has tars whose members *.json.gz are JSON lists of token ids, and usually manifest.jsonl, with or without a
final newline. One pass over the shards finds where each sample lies and how long it is. The index (pool.json,
index.bin, tokenizer.json) goes beside the shards, or to --output. Shards that the manifest lists and the directory
lacks are an error; tars that it does not list are reported and left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.existing import IndexReport, index_existing
from megatron_groupmates.pool.tokenizer import PoolTokenizer


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, metavar="DIRECTORY", help="directory of the shards")
    parser.add_argument("--output", metavar="POOL", help="where the index goes (default: beside the shards)")
    parser.add_argument(
        "--tokenizer", required=True, metavar="T", help="that made the ids: a tokenizer.json, a directory with one, or a Hugging Face name"
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="token after each document (default: the tokenizer's end-of-sequence token, else <|endoftext|>)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that read shards, 0 for none beside this one (default: the cores, %(default)s)",
    )
    return parser.parse_args(arguments)


def describe(report: IndexReport, output: str) -> str:
    """The report in words."""
    lines = [
        f"indexed {output}" if report.built else f"{output} is a pool already: nothing to do",
        f"  {report.num_shards:,} shards, {report.num_samples:,} samples, {report.num_tokens:,} tokens",
    ]
    for names, what in (
        (report.extra, "not in the manifest, left out"),
        (report.repeated, "listed twice, used once"),
        (report.empty, "without a sample, left out"),
    ):
        if names:
            lines.append(f"  {len(names)} shards {what}: {', '.join(names)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    output = args.output or args.shards
    try:
        report = index_existing(args.shards, output, PoolTokenizer.load(args.tokenizer, args.eot), args.workers)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(report, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
