#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on raw documents (``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.jsonl.zstd``).

    python tools/train_tokenizer.py --input RAW/pool --output TOKENIZER --vocab-size 4096

The folder it writes loads with ``transformers.AutoTokenizer.from_pretrained``. As in GPT-NeoX, token 0 is
``<|endoftext|>`` and token 1 ``<|padding|>``. Every text is encoded without loss: the 256 bytes are in the vocabulary
and nothing is normalised. The same documents, in the same order, give the same tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess.records import Document, DocumentFile, InputFile, find_inputs
from megatron_groupmates.utils.files import atomic_directory, write_json
from megatron_groupmates.utils.progress import progress_bar

SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")
NUM_BYTES = 256


def shared_texts(files: Sequence[InputFile], max_bytes: int) -> Iterator[str]:
    """Texts of all files in turn, at most ``max_bytes / len(files)`` of each, so that none crowds the others out."""
    for file in files:
        remaining = max_bytes // len(files)
        for document in DocumentFile(file):
            if isinstance(document, Document):
                yield document.text
                remaining -= len(document.text.encode())
                if remaining <= 0:
                    break


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens (fewer where the texts are too small for as many merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def counted(texts: Iterable[str], bar: tqdm) -> Iterator[str]:
    """Pass ``texts`` on and move ``bar`` by one for each."""
    for text in texts:
        bar.update()
        yield text


def save(tokenizer: Tokenizer, output: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` to the new folder ``output``."""
    end, padding = SPECIAL_TOKENS
    with atomic_directory(output) as directory:
        tokenizer.save(str(directory / "tokenizer.json"))
        write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": end,
                "eos_token": end,
                "unk_token": end,
                "pad_token": padding,
                "add_prefix_space": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 1_000_000_000,
            },
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="raw files, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, must not exist yet")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, special ones included (default: 4096)")
    parser.add_argument(
        "--max-bytes", type=int, default=20_000_000, help="text to train on, shared equally by the files (default: %(default)s)"
    )
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """UserError for values that cannot work."""
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if arguments.vocab_size < smallest:
        raise UserError(
            f"--vocab-size {arguments.vocab_size}: at least {smallest} are needed (all bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    if arguments.max_bytes < 1:
        raise UserError(f"--max-bytes {arguments.max_bytes}: must be positive")
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output} exists already; choose another folder or remove it")


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        check_arguments(arguments)
        files, _ = find_inputs(arguments.input)
        with progress_bar(None, "train tokenizer", unit="document") as bar:
            tokenizer = train(counted(shared_texts(files, arguments.max_bytes), bar), arguments.vocab_size)
        found = tokenizer.get_vocab_size()
        if found < arguments.vocab_size:
            raise UserError(
                f"--vocab-size {arguments.vocab_size}: the documents have repeated text for only {found} "
                "tokens; lower it or give more documents"
            )
        save(tokenizer, arguments.output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {found} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
