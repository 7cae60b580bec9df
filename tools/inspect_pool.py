#!/usr/bin/env python
"""Show what a pool holds, and check that it is whole.

    python tools/inspect_pool.py POOL
    python tools/inspect_pool.py POOL --verify
    python tools/inspect_pool.py POOL --sample shard_00000003:17
    python tools/inspect_pool.py POOL --by url.domain --generation RUN/selection

Without options: counts, formats, tokenizer, and lengths of the samples in tokens. --by breaks samples and tokens down
by kind (at once), or by domain, file or another field that was kept when the pool was made (reads the sources beside
the shards); with --generation also what that generation selects of each. --verify reads every byte: digests of all
files, and that every sample decodes to as many ids as the index says; it lists what is damaged and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.subset import open_subset
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.inspection import KIND, break_down, describe_pool, describe_sample, top_rows
from megatron_groupmates.pool.verification import verify_pool
from megatron_groupmates.utils.arguments import add_storage_options, add_workers, use_storage_options

_BAR_WIDTH = 40
_VALUE_WIDTH = 40


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", metavar="POOL", help="directory or URL of the pool")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--verify", action="store_true", help="read every shard and list what is damaged")
    parser.add_argument("--sample", metavar="SHARD:ROW", help="show a sample; a number alone is a row of the whole pool")
    parser.add_argument("--by", metavar="FIELD", help="break down by kind, url.domain, file, or a field kept with the sources")
    parser.add_argument(
        "--generation",
        metavar="G",
        help="show what it selects: a generation's directory, SELECTION_DIR:N, or SELECTION_DIR for the newest",
    )
    add_storage_options(parser)
    add_workers(parser, "read shards or sources")
    return parser.parse_args(arguments)


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for, as JSON values."""
    if args.verify:
        index = PoolIndex.open(args.pool, verify=False)
        return {**describe_pool(index), "damaged": verify_pool(index, args.workers)}
    mask, generation = None, {}
    if args.generation is None:
        index = PoolIndex.open(args.pool)
    else:
        subset = open_subset(args.pool, args.generation)
        index, mask = subset.index, subset.mask
        generation = {"generation": {**subset.source, "samples": subset.num_samples, "tokens": subset.num_tokens}}
    result = {**describe_pool(index), **generation}
    by = args.by or (KIND if args.generation is not None or index.kinds else None)
    if by is not None:
        result["by"] = {"field": by, "rows": top_rows(break_down(index, by, mask, args.workers))}
    if args.sample is not None:
        result["sample"] = describe_sample(index, args.sample)
    return result


def render(result: dict[str, Any]) -> str:
    """The same as tables."""
    lengths, tokenizer = result["lengths"], result["tokenizer"]
    lines = [
        f"pool         {result['pool']}",
        f"shards       {result['shards']:,} in {result['shard_directory']} ({result['bytes']:,} bytes)",
        f"samples      {result['samples']:,}",
        f"tokens       {result['tokens']:,}",
        f"members      {result['member_format']}" + (f", {result['token_dtype']}" if result["member_format"] == "raw" else ""),
        f"tokenizer    {tokenizer['name']}, {tokenizer['vocab_size']:,} ids, end of text {tokenizer['eot_id']}",
        f"fingerprint  {result['fingerprint']}",
        f"lengths      min {lengths['min']:,}, median {lengths['median']:,.1f}, mean {lengths['mean']:,.1f}, max {lengths['max']:,}",
    ]
    most = max(count for _, _, count in lengths["histogram"])
    for first, last, count in lengths["histogram"]:
        lines.append(f"  {first:>9,} - {last:>9,} {count:>14,}  {'#' * -(-_BAR_WIDTH * count // most)}")
    if "generation" in result:
        generation = result["generation"]
        lines.append(
            f"selected     {generation['generation']}: {_share(generation['samples'], result['samples'])} of the samples, "
            f"{_share(generation['tokens'], result['tokens'])} of the tokens"
        )
    if "by" in result:
        lines += ["", *_table(result["by"]["field"], result["by"]["rows"], result["samples"], result["tokens"])]
    if "sample" in result:
        lines += ["", *_sample(result["sample"])]
    if "damaged" in result:
        lines += ["", *(f"damaged: {line}" for line in result["damaged"])] if result["damaged"] else ["", "verified: nothing is damaged"]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _table(field: str, rows: list[dict[str, Any]], num_samples: int, num_tokens: int) -> list[str]:
    is_selected = "selected_samples" in rows[0]
    head = f"{field:<{_VALUE_WIDTH}} {'samples':>14} {'share':>7} {'tokens':>18} {'share':>7}"
    lines = [head + (f" {'selected samples':>17} {'tokens':>7}" if is_selected else "")]
    for row in rows:
        value = row["value"] if len(row["value"]) <= _VALUE_WIDTH else row["value"][: _VALUE_WIDTH - 3] + "..."
        line = f"{value:<{_VALUE_WIDTH}} {row['samples']:>14,} {_share(row['samples'], num_samples):>7}"
        line += f" {row['tokens']:>18,} {_share(row['tokens'], num_tokens):>7}"
        if is_selected:
            line += f" {_share(row['selected_samples'], row['samples']):>17} {_share(row['selected_tokens'], row['tokens']):>7}"
        lines.append(line)
    return lines


def _sample(sample: dict[str, Any]) -> list[str]:
    lines = [
        f"sample {sample['shard']}:{sample['row']} (row {sample['pool_row']} of the pool), {sample['kind']}, {sample['num_tokens']} tokens"
    ]
    for document in sample["documents"]:
        place = f"  {document['file']}:{document['line']}, tokens {document['first_token']} to "
        lines.append(f"{place}{document['first_token'] + document['num_tokens'] - 1} {document['url']}".rstrip())
    return [*lines, "", sample["text"]]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        if args.workers < 0:
            raise UserError(f"--workers {args.workers} should be at least 0")
        use_storage_options(args)
        result = inspect(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if args.json else render(result))
    return 1 if result.get("damaged") else 0


if __name__ == "__main__":
    sys.exit(main())
