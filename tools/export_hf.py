#!/usr/bin/env python
"""Write a checkpoint as a Hugging Face model that transformers loads without remote code.

    python tools/export_hf.py --checkpoint runs/a --output exports/a
    lm_eval --model hf --model_args pretrained=exports/a,dtype=float32 --tasks hellaswag,arc_easy --batch_size auto

The checkpoint is a run directory (its newest complete checkpoint, or --tag global_step1000), DeepSpeed's save directory, or
one tag in it, saved at any ZeRO stage, precision and tensor-parallel size. The weights are the float32 master weights. The
architecture is Qwen3ForCausalLM (transformers 4.51 or newer), which is our model exactly: logits are equal up to rounding.

The tokenizer of the run's pool goes along, and the embedding keeps only the rows that it has tokens for: the padding of
the vocabulary is cut, so that its (tiny) probability falls to the real tokens. With --no-tokenizer all rows are kept.

Memory: one file of --max-shard-size and one parameter. The output is complete or absent. Again with the same arguments: nothing
to do; with others: the earlier export is replaced when the new one is complete. A directory that holds something else is
refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.checkpoint.export_directory import DTYPES, ExportOptions, config_of_checkpoint, export_checkpoint, find_tag
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, parse_config
from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.remote import RemoteSettings
from megatron_groupmates.pool.tokenizer import PoolTokenizer


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run directory, its checkpoints directory, or a tag in it")
    parser.add_argument("--tag", metavar="TAG", help="which checkpoint, such as global_step1000 (default: the newest complete one)")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write: absent, empty or an earlier export")
    parser.add_argument("--config", metavar="YAML", help="config of the run (default: the one saved in the checkpoint)")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", metavar="T", help="a tokenizer.json, a directory with one, or a Hugging Face name (default: that of the run's pool)"
    )
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="export none, and keep every row of the embedding")
    parser.add_argument("--eot", metavar="TOKEN", help="with --tokenizer: its end-of-text token, if it does not name it itself")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the exported weights (default: %(default)s)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest safetensors file (default: %(default)s)")
    return parser.parse_args(arguments)


def find_tokenizer(args: argparse.Namespace, config: Config) -> PoolTokenizer | None:
    """The tokenizer to export, None where none is wanted.

    Raises:
        UserError: it cannot be loaded.
    """
    if args.no_tokenizer:
        return None
    if args.tokenizer is not None:
        return PoolTokenizer.load(args.tokenizer, args.eot)
    try:
        return PoolTokenizer.of_pool(PoolIndex.open(config.data.pool, remote=RemoteSettings.of(config)))
    except (UserError, OSError) as error:
        raise UserError(
            f"the tokenizer of the run's pool (data.pool) cannot be read: {error}; name it with --tokenizer, or give --no-tokenizer"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(arguments)
    try:
        checkpoint = ZeroCheckpoint(find_tag(args.checkpoint, args.tag))
        config = (
            config_of_checkpoint(checkpoint) if args.config is None else parse_config(Path(args.config).read_text(), source=args.config)
        )
        options = ExportOptions(dtype=args.dtype, max_shard_size=args.max_shard_size)
        record, written = export_checkpoint(checkpoint, config, find_tokenizer(args, config), args.output, options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not written:
        print(f"{args.output} is complete already, made from the same checkpoint with the same arguments: nothing to do")
        return 0
    rows = f"{record['vocab_size']:,} of {config.model.vocab_size:,} vocabulary rows"
    print(f"wrote {args.output}: step {record['step']:,}, {record['dtype']}, {rows}, {len(record['files'])} files of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
