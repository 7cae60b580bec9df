#!/usr/bin/env python
"""Find samples of a pool that overlap reference and evaluation sets, by token n-grams, and list them for exclusion.

    python tools/check_contamination.py --pool data/pool --against data/flan/oracle data/flan/evaluation --output data/check

writes data/check/overlaps.jsonl (which samples share how many n-grams with which examples), summary.json (which share of
each set is touched) and exclude.json. A run with  data.exclude: data/check/exclude.json  never trains on the listed samples.

Ids are compared, so pool and sets must have one tokenizer. At the beginning of a sample, and after another document of a
packed context, the first one or two ids of a copied passage may differ from those in running text; an overlap is missed
only where the passage is hardly longer than an n-gram. n-grams never reach across samples, but within a packed context
they may reach from one document into the next.

A sample counts with its first shared n-gram. Phrases that the web repeats (licences, menus) make many samples of a pool
overlap: --max-pool-count 10 leaves out n-grams that occur in more than ten of its samples, as was done for GPT-3. The
check goes on where it was killed, and another --max-pool-count needs no second search.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.references.contamination_check import EXCLUDE_FILE, check_contamination
from megatron_groupmates.utils.arguments import add_storage_options, add_workers, use_storage_options


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, metavar="POOL", help="the pool to train on")
    parser.add_argument("--against", nargs="+", required=True, metavar="SET", help="reference and evaluation sets")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the results")
    parser.add_argument("--ngram", type=int, default=13, metavar="N", help="tokens per n-gram (default: %(default)s)")
    parser.add_argument(
        "--max-pool-count", type=int, metavar="N", help="leave out n-grams in more samples of the pool than that (default: leave out none)"
    )
    add_storage_options(parser)
    add_workers(parser, "search")
    return parser.parse_args(arguments)


def report(summary: dict, output: str) -> str:
    """The summary in words."""
    share = summary["overlapping_samples"] / summary["samples"]
    lines = [
        f"{summary['samples']:,} samples with {summary['tokens']:,} tokens searched for n-grams of {summary['ngram']} tokens",
        f"  overlapping samples  {summary['overlapping_samples']:>14,}  ({100 * share:.3f} % of the pool)",
        f"  common n-grams       {summary['common_ngrams']:>14,}  left out",
    ]
    for name, counts in summary["references"].items():
        lines.append(
            f"  {name}: {counts['examples_touched']:,} of {counts['examples']:,} examples touched "
            f"({100 * counts['share_touched']:.2f} %); {counts['examples_too_short']:,} are shorter than an n-gram"
        )
    return "\n".join([*lines, f"to never train on these samples, set  data.exclude: {Path(output) / EXCLUDE_FILE}"])


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        use_storage_options(args)
        summary = check_contamination(
            args.pool, args.against, args.output, ngram=args.ngram, max_pool_count=args.max_pool_count, num_workers=args.workers
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(summary, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
