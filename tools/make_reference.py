#!/usr/bin/env python
"""Make reference and evaluation sets of held-out examples, tokenised as the pool they are for.

    python tools/make_reference.py --input 'flan/*.jsonl.zst' --output data/flan --pool data/pool --size 128 \\
        --sizes evaluation=1024

writes data/flan/oracle (data.reference of a run: the examples whose loss selection minimises), data/flan/oracle_noise (as
many others, to see how much of an influence is noise) and data/flan/evaluation (data.evaluation). Each is a pool directory
that also says which of its tokens are scored. A record of the input is one of

    {"context": ..., "continuation": ...}    only the continuation is scored
    {"messages": [{"role", "content"}, ...]}  only what the assistant says is scored
    {"text": ...}                             all tokens but the first are scored

Context and continuation are tokenised as lm-evaluation-harness does it. A chat is written with the tokenizer directory's
chat template where that marks the assistant's part ({% generation %}), else as "User: ...", "Assistant: ...".

No two parts share a document, now or when you make them again with more input, other sizes or another seed: a document
(the text, the context, or the messages before the first answer) belongs to one of the three parts by its content alone.
Equal examples are one. Same input, arguments and seed: byte-identical output. Lines that cannot be used are listed in
OUTPUT/rejects.jsonl. The sets are complete or absent. Check them against the pool with tools/check_contamination.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.references.build import PARTS, ReferenceOptions, build_reference
from megatron_groupmates.pool.references.encode import ChatTemplate
from megatron_groupmates.pool.references.records import ExampleFields
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.arguments import add_storage_options, use_storage_options


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl files, also .gz and .zst, glob patterns (quoted), directories or URLs",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the sets")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--pool", metavar="POOL", help="the pool to train on: its tokenizer and its longest sample are taken")
    tokenizer.add_argument("--tokenizer", metavar="T", help="a tokenizer.json, a directory with one, or a Hugging Face name")
    parser.add_argument("--eot", metavar="TOKEN", help="with --tokenizer: its end-of-text token, if it does not name it itself")
    parser.add_argument("--size", type=int, required=True, metavar="N", help="examples of each part")
    parser.add_argument("--sizes", default="", metavar="PART=N,...", help=f"examples of single parts ({', '.join(PARTS)}); 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the sample taken of each part (default: %(default)s)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest example, sequence length + 1 (default: the longest sample of --pool). Longer texts lose their end, others their "
        "beginning",
    )
    parser.add_argument("--delimiter", default="", metavar="TEXT", help="put between context and continuation (default: nothing)")
    for name, default in vars(ExampleFields()).items():
        parser.add_argument(f"--{name}-field", default=default, metavar="PATH", help="dotted path in a record (default: %(default)s)")
    parser.add_argument("--max-rejects", type=int, metavar="N", help="end with an error when more lines than this cannot be used")
    add_storage_options(parser)
    return parser.parse_args(arguments)


def parse_sizes(size: int, text: str) -> dict[str, int]:
    """Examples of each part, from ``--size`` and ``--sizes``.

    Raises:
        UserError: ``--sizes`` cannot be read.
    """
    sizes = dict.fromkeys(PARTS, size)
    for item in filter(None, text.split(",")):
        part, _, count = item.partition("=")
        if not count.strip().isdigit():
            raise UserError(f"--sizes: {item!r} is not PART=N, such as evaluation=1024")
        sizes[part.strip()] = int(count)
    return sizes


def report(summary: dict, output: str, built: bool) -> str:
    """The summary in words."""
    kinds = "".join(f"\n    {kind:<16}{count:>14,}" for kind, count in summary["rejects_by_kind"].items())
    head = f"wrote {output}" if built else f"{output} is complete already, made with the same arguments: nothing to do"
    lines = [
        head,
        f"  examples read     {summary['read']:>14,}",
        f"  rejected          {summary['rejected']:>14,}{kinds}",
        f"  duplicates        {summary['duplicates']:>14,}  of examples already taken",
        f"  not chosen        {summary['not_chosen']:>14,}",
        f"  chosen            {summary['chosen']:>14,}",
    ]
    lines += [
        f"    {name:<16}{part['examples']:>14,}  {part['scored_tokens']:,} of {part['tokens']:,} tokens scored; {part['examples_cut']:,} "
        f"examples cut by {part['tokens_cut']:,} tokens"
        for name, part in summary["parts"].items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        use_storage_options(args)
        if args.pool is not None:
            pool = PoolIndex.open(args.pool)
            tokenizer, max_tokens, chat_template = PoolTokenizer.of_pool(pool), args.max_tokens or int(pool.lengths.max()), None
        else:
            tokenizer, max_tokens = PoolTokenizer.load(args.tokenizer, args.eot), args.max_tokens
            chat_template = ChatTemplate.load(args.tokenizer, tokenizer.vocab_size)
        if max_tokens is None:
            raise UserError("--tokenizer does not tell how long an example may be; give --max-tokens, the model's sequence length + 1")
        options = ReferenceOptions(
            sizes=parse_sizes(args.size, args.sizes),
            max_tokens=max_tokens,
            seed=args.seed,
            delimiter=args.delimiter,
            fields=ExampleFields(**{name: getattr(args, f"{name}_field") for name in vars(ExampleFields())}),
        )
        summary, built = build_reference(
            args.input, args.output, tokenizer, options, chat_template=chat_template, max_rejects=args.max_rejects
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(summary, args.output, built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
