#!/usr/bin/env python
"""Turn raw DCLM data (.jsonl, .jsonl.gz, .jsonl.zst, .jsonl.zstd) into a pool of token shards.

    python tools/preprocess_dclm.py --input RAW_DIRECTORY --output POOL --tokenizer EleutherAI/gpt-neox-20b --pack 2049

With --pack N the documents of each input file are put one after the other, each followed by the end-of-text token, and
cut into contexts of N tokens that do not overlap. N is the model's sequence length plus one. What is left at the end of
a file, less than a context, is dropped and counted: filled up with padding, it would be trained on. Without --pack each
document is a sample, with its end-of-text token.

Special tokens that are written out in a document are text and never become control tokens. Samples are shuffled over
the whole pool. Same input, arguments and seed: byte-identical output, whatever --workers. Lines that cannot be used are
listed with file, line and kind in POOL/rejects.jsonl. A pool is complete or absent.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.build import BuildOptions, build_pool
from megatron_groupmates.pool.index import MEMBER_FORMATS
from megatron_groupmates.pool.tokenizer import PoolTokenizer


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, glob patterns (quoted), or directories, searched to any depth"
    )
    parser.add_argument("--output", required=True, metavar="POOL", help="directory of the pool")
    parser.add_argument("--tokenizer", required=True, metavar="T", help="a tokenizer.json, a directory with one, or a Hugging Face name")
    parser.add_argument(
        "--pack", type=int, metavar="N", help="tokens per packed context: sequence length + 1 (default: one sample per document)"
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="token put after each document (default: the tokenizer's end-of-sequence token, else <|endoftext|>)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=8192, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that tokenise, 0 for none beside this one (default: the cores, %(default)s)",
    )
    parser.add_argument("--text-field", default="text", metavar="PATH", help="dotted path of the text in a record (default: %(default)s)")
    parser.add_argument(
        "--kind-field",
        default="metadata.kind",
        metavar="PATH",
        help="dotted path of the kind of source, for reports (default: %(default)s)",
    )
    parser.add_argument(
        "--max-rejects", type=int, metavar="N", help="end with an error when more lines than this cannot be used (default: no limit)"
    )
    parser.add_argument(
        "--member-format",
        choices=MEMBER_FORMATS,
        default="raw",
        help="raw little-endian ids, or DCLM's gzip of a JSON list (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def report(summary: dict, output: str, built: bool) -> str:
    """The summary in words."""
    kinds = "".join(f"\n    {kind:<16}{count:>14,}" for kind, count in summary["rejects_by_kind"].items())
    head = f"wrote {output}" if built else f"{output} is complete already, made with the same arguments: nothing to do"
    return (
        f"{head}\n"
        f"  documents read    {summary['documents_read']:>14,}\n"
        f"  accepted          {summary['documents_accepted']:>14,}\n"
        f"  rejected          {summary['documents_rejected']:>14,}{kinds}\n"
        f"  tokens encoded    {summary['tokens_encoded']:>14,}  (one end-of-text token per document included)\n"
        f"  dropped in tails  {summary['tokens_dropped_in_tails']:>14,}\n"
        f"  tokens in pool    {summary['tokens_in_pool']:>14,}  in {summary['samples']:,} samples"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        options = BuildOptions(
            pack=args.pack,
            samples_per_shard=args.samples_per_shard,
            seed=args.seed,
            text_field=args.text_field,
            kind_field=args.kind_field,
            member_format=args.member_format,
        )
        summary, built = build_pool(
            args.input,
            args.output,
            PoolTokenizer.load(args.tokenizer, args.eot),
            options,
            num_workers=args.workers,
            max_rejects=args.max_rejects,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "; free space or choose another --output" if error.errno == errno.ENOSPC else ""
        print(f"error: cannot make {args.output}: {error}{hint}. No partial pool is left", file=sys.stderr)
        return 1
    print(report(summary, args.output, built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
