"""Compare tokenisation speed on one core: Megatron-LM's preprocessing encoder, Hugging Face's batch call, and ours.

    python tools/bench/bench_tokenizer.py --tokenizer gpt-neox-20b/tokenizer.json --megatron Megatron-LM

All take the same JSON lines to ids, one thread each, in turns, and must give the same ids. With ``--megatron`` the encoder is
the ``Encoder`` class of that checkout's ``tools/preprocess_data.py``; without, the calls it makes for each document, through
``transformers``. Documents in which a special token is written out are left out: Megatron-LM makes control tokens of
them. Times are of the thread's CPU, so that other work on the machine matters less. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the only way to keep the library on one thread

from tokenizers import Tokenizer

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.tokenizer import PoolTokenizer

ENDINGS = (".py", ".md", ".rst", ".txt", ".html", ".h", ".js")
MIN_CHARACTERS, MAX_CHARACTERS = 500, 50_000
Encode = Callable[[list[str]], list[list[int]]]


def find_texts(places: list[Path], num_bytes: int, seed: int) -> Iterator[str]:
    """UTF-8 text files at or below ``places``, in random order, about ``num_bytes`` in all, long ones cut."""
    paths = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    candidates = [path for path in paths if path in places or (path.suffix in ENDINGS and path.is_file())]
    random.Random(seed).shuffle(candidates)
    for path in candidates:
        try:
            text = path.read_text(encoding="utf-8")[:MAX_CHARACTERS]
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= MIN_CHARACTERS:
            yield text
            num_bytes -= len(text.encode())
        if num_bytes <= 0:
            return


def transformers_directory(content: bytes, eot: str, directory: Path) -> Path:
    """A directory that ``AutoTokenizer`` loads the tokenizer from."""
    (directory / "tokenizer.json").write_bytes(content)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot, "unk_token": eot}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def megatron_encoder(checkout: Path | None, directory: Path) -> tuple[str, Encode]:
    """(name, what Megatron-LM's preprocessing does for each line)."""
    if checkout is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        return "Megatron-LM's calls", lambda lines: [tokenizer(json.loads(line)["text"]).input_ids for line in lines]
    module = _import_script(checkout)
    arguments = ["--input", "-", "--output-prefix", "-", "--workers", "1"]
    given = sys.argv
    sys.argv = ["preprocess_data.py", *arguments, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory)]
    try:
        encoder = module.Encoder(module.get_args())
    finally:
        sys.argv = given
    encoder.initializer()
    return "Megatron-LM's Encoder", lambda lines: [encoder.encode(line)[0]["text"] for line in lines]


def _import_script(checkout: Path) -> Any:
    """``tools/preprocess_data.py`` of a checkout, with the megatron package of that checkout."""
    sys.path.insert(0, str(checkout))
    path = checkout / "tools" / "preprocess_data.py"
    spec = importlib.util.spec_from_file_location("preprocess_data", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--megatron {checkout}: there is no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def huggingface_encoder(content: bytes) -> Encode:
    """The batch call without offsets."""
    tokenizer = Tokenizer.from_str(content.decode())

    def encode(lines: list[str]) -> list[list[int]]:
        texts = [json.loads(line)["text"] for line in lines]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def measure(encoders: dict[str, Callable[[list[str]], list[Any]]], lines: list[str], repeats: int) -> dict[str, float]:
    """Median seconds of each on all lines, in turns; exits where ids differ."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(repeats):
        results = {}
        for name, encode in encoders.items():
            start = time.thread_time()
            results[name] = encode(lines)
            seconds[name].append(time.thread_time() - start)
        first, *others = ([list(ids) for ids in result] for result in results.values())
        if any(first != other for other in others):
            sys.exit("the ids differ")
    return {name: statistics.median(values) for name, values in seconds.items()}


def parse_arguments() -> SimpleNamespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_text = [Path("/usr/share/doc"), Path(sysconfig.get_path("purelib"))]
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, directory or Hugging Face name")
    parser.add_argument("--text", type=Path, nargs="+", default=default_text, help="text files or folders of them (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=8, help="how much text to take (default: %(default)s)")
    parser.add_argument("--megatron", type=Path, help="Megatron-LM checkout (default: the calls it makes, by transformers)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each; medians are shown (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of files (default: %(default)s)")
    return SimpleNamespace(**vars(parser.parse_args()))


def main() -> None:
    arguments = parse_arguments()
    tokenizer = PoolTokenizer.load(arguments.tokenizer)
    stock = Tokenizer.from_str(tokenizer.content.decode())
    special = [token.content for token in stock.get_added_tokens_decoder().values() if token.special]
    texts = [
        text
        for text in find_texts(arguments.text, int(arguments.megabytes * 1e6), arguments.seed)
        if not any(content in text for content in special)
    ]
    lines = [json.dumps({"text": text}) for text in texts]
    mebibytes = sum(len(text.encode()) for text in texts) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        directory = transformers_directory(tokenizer.content, stock.id_to_token(tokenizer.eot_id), Path(folder))
        name, megatron = megatron_encoder(arguments.megatron, directory)
        encoders = {
            name: megatron,
            "tokenizers, encode_batch_fast": huggingface_encoder(tokenizer.content),
            f"PoolTokenizer ({tokenizer.engine})": lambda lines: tokenizer.encode_batch([json.loads(line)["text"] for line in lines]),
        }
        seconds = measure(encoders, lines, arguments.repeats)
    print(f"{len(texts)} documents, {mebibytes:.1f} MiB of text; {tokenizer.engine}: {tokenizer.engine_reason}\n")
    print("| encoder | MiB/s | ratio |\n|---|---|---|")
    for encoder, value in seconds.items():
        print(f"| {encoder} | {mebibytes / value:.2f} | {seconds[name] / value:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
