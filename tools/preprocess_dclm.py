#!/usr/bin/env python
"""Turn raw DCLM data (.jsonl, .jsonl.gz, .jsonl.zst, .jsonl.zstd) into a pool of token shards.

    python tools/preprocess_dclm.py --input RAW_DIRECTORY --output POOL --tokenizer EleutherAI/gpt-neox-20b --pack 2049

With --pack N the documents of each input file are put one after the other, each followed by the end-of-text token, and
cut into contexts of N tokens that do not overlap. N is the model's sequence length plus one. What is left at the end of
a file, less than a context, is dropped and counted: filled up with padding, it would be trained on. Without --pack each
document is a sample, with its end-of-text token. Special tokens that are written out in a document are text and never
become control tokens.

Inputs and output are local paths or fsspec URLs (s3://, gs://, hf://, ...; see --storage-options). Samples are shuffled
over the whole pool in two passes: files to cells, cells to shards. Between the passes they lie in the work directory,
which needs about as much space as the pool and is removed at the end.

Killed, out of space, or an input that cannot be read? Repeat the same command: it redoes only what is not finished. Other
arguments are refused as long as the work directory is there. The pool is complete when it has its pool.json.

Many hosts: start the same command under srun, torchrun or deepspeed, with input and work directory on a file system that
all hosts share (and the output, unless it is remote). Files and cells are split by rank; the ranks wait for each other
through the work directory.

    srun --ntasks-per-node 1 python tools/preprocess_dclm.py --input s3://raw/dclm --output s3://pools/dclm \\
        --work-directory /shared/dclm.work --tokenizer EleutherAI/gpt-neox-20b --pack 2049 --max-rejects 1000000

Same input, arguments and seed: byte-identical shards and index, whatever --workers, the number of hosts, and kills. (Members
in json.gz and the zstd files of sources also depend on the versions of zlib and zstd; a run with other versions does not
continue one.) Memory of a worker, whatever the size of the input: 300 MiB or 100 MiB plus --cell-bytes, whichever is more;
where text makes more tokens than is usual, up to 100 MiB plus twice --cell-bytes. Each cell is read from every input
file's part: with tens of thousands of files choose larger cells, such as 4 GiB.

Lines that cannot be used are listed with file, line and kind in POOL/rejects.jsonl, input files with their counts and
SHA-256 in POOL/inputs.jsonl. An input file with the same bytes as an earlier one is left out (kind duplicate_input).
--max-rejects, checked whenever a file is finished, counts all kinds but low_quality: that is the quality filter's work and
may be most of the documents.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.parallel.launch import LaunchEnvironment, read_launch_environment
from megatron_groupmates.pool.index import MEMBER_FORMATS
from megatron_groupmates.pool.preprocess.build import build_pool
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.arguments import add_storage_options, use_storage_options

_KEPT = "Finished work is kept: "


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_places(parser)
    _add_content(parser)
    _add_filter(parser)
    group = parser.add_argument_group("running (no influence on the pool)")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, each of which does a whole file or cell; 0 for none beside this one "
        "(default: the cores that this process may use, divided by the ranks of the host)",
    )
    group.add_argument(
        "--max-rejects",
        type=int,
        metavar="N",
        help="end with an error when more documents than this are rejected, over all files and hosts (default: no limit)",
    )
    group.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(arguments)


def _add_places(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, glob patterns (quoted), or directories, searched to any depth; or URLs",
    )
    group.add_argument("--output", required=True, metavar="POOL", help="directory or URL of the pool")
    group.add_argument("--tokenizer", required=True, metavar="T", help="a tokenizer.json, a directory with one, or a Hugging Face name")
    group.add_argument(
        "--work-directory",
        metavar="DIR",
        help="where unfinished work is kept: local, for several hosts on a shared file system "
        "(default: POOL.work; required for a remote pool)",
    )
    add_storage_options(group)


def _add_content(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("content of the pool")
    group.add_argument(
        "--pack", type=int, metavar="N", help="tokens per packed context: sequence length + 1 (default: one sample per document)"
    )
    group.add_argument(
        "--eot", metavar="TOKEN", help="token put after each document (default: the tokenizer's end-of-sequence token, else <|endoftext|>)"
    )
    group.add_argument("--samples-per-shard", type=int, default=BuildOptions.samples_per_shard, metavar="N", help="default: %(default)s")
    group.add_argument("--seed", type=int, default=BuildOptions.seed, help="of the shuffle (default: %(default)s)")
    group.add_argument(
        "--cell-bytes",
        type=int,
        default=BuildOptions.cell_bytes,
        metavar="N",
        help="ids of a cell of the shuffle, about; shapes the order of samples (default: %(default)s)",
    )
    group.add_argument(
        "--text-field", default=BuildOptions.text_field, metavar="PATH", help="dotted path of the text in a record (default: %(default)s)"
    )
    group.add_argument(
        "--kind-field",
        default=BuildOptions.kind_field,
        metavar="PATH",
        help="dotted path of the kind of source, for reports; url.domain for the host of the document's URL (default: %(default)s). "
        "The rarest of more than 32768 kinds become one, (other)",
    )
    group.add_argument(
        "--metadata-field",
        action="append",
        default=[],
        metavar="PATH",
        help="dotted path of something else to keep beside each document; may be given again; url.domain as above",
    )
    group.add_argument(
        "--member-format",
        choices=MEMBER_FORMATS,
        default=BuildOptions.member_format,
        help="raw little-endian ids, or DCLM's gzip of a JSON list (default: %(default)s)",
    )


def _add_filter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality filter")
    group.add_argument("--fasttext-model", metavar="PATH", help="a fastText classifier such as DCLM's; needs the package fasttext")
    group.add_argument(
        "--fasttext-label",
        metavar="L",
        default=BuildOptions.fasttext_label,
        help="label whose probability is the score (default: %(default)s)",
    )
    group.add_argument("--fasttext-threshold", type=float, metavar="X", help="leave out documents with a lower score")
    group.add_argument(
        "--fasttext-top-fraction", type=float, metavar="F", help="instead: keep this share of all documents (the text is read twice)"
    )


def report(summary: dict, output: str, built: bool, tokenizer: PoolTokenizer) -> str:
    """The summary in words."""
    kinds = "".join(f"\n    {kind:<16}{count:>14,}" for kind, count in summary["rejects_by_kind"].items())
    head = f"wrote {output}" if built else f"{output} is complete already, made with the same arguments: nothing to do"
    # Of a pool that was there nothing was encoded, and to find out would take a second.
    engine = f"\n  tokenizer engine  {tokenizer.engine}: {tokenizer.engine_reason}" if built else ""
    return (
        f"{head}\n"
        f"  input files       {summary['inputs']:>14,}{_repeated(summary)}\n"
        f"  documents read    {summary['documents_read']:>14,}\n"
        f"  accepted          {summary['documents_accepted']:>14,}\n"
        f"  rejected          {summary['documents_rejected']:>14,}{kinds}\n"
        f"  tokens encoded    {summary['tokens_encoded']:>14,}  (one end-of-text token per document included)\n"
        f"  in duplicates     {summary['tokens_in_duplicates']:>14,}\n"
        f"  dropped in tails  {summary['tokens_dropped_in_tails']:>14,}\n"
        f"  tokens in pool    {summary['tokens_in_pool']:>14,}  in {summary['samples']:,} samples{engine}"
    )


def _repeated(summary: dict) -> str:
    counts = {"duplicates": summary["inputs_duplicate"], "named twice": summary["inputs_named_twice"]}
    words = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"  ({words})" if words else ""


def build(args: argparse.Namespace, launch: LaunchEnvironment) -> None:
    """Build the pool on this rank and print the summary on the first."""
    use_storage_options(args)
    options = BuildOptions(
        pack=args.pack,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        text_field=args.text_field,
        kind_field=args.kind_field,
        metadata_fields=tuple(args.metadata_field),
        member_format=args.member_format,
        cell_bytes=args.cell_bytes,
        fasttext_model=args.fasttext_model,
        fasttext_label=args.fasttext_label,
        fasttext_threshold=args.fasttext_threshold,
        fasttext_top_fraction=args.fasttext_top_fraction,
    )
    num_cores = len(os.sched_getaffinity(0))
    tokenizer = PoolTokenizer.load(args.tokenizer, args.eot)
    summary, built = build_pool(
        args.input,
        args.output,
        tokenizer,
        options,
        num_workers=max(num_cores // launch.local_world_size, 1) if args.workers is None else args.workers,
        max_rejects=args.max_rejects,
        work_directory=args.work_directory,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    if launch.rank == 0:
        assert summary is not None
        print(report(summary, args.output, built, tokenizer))


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", force=True)
    try:
        build(args, read_launch_environment(os.environ, args.local_rank))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "free space; then " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(
            f"error: cannot make {args.output}: {error}. Finished work is kept: {hint}repeat the same command to continue", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(f"interrupted. {_KEPT}repeat the same command to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
