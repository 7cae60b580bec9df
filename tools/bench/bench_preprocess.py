"""Measure tools/preprocess_dclm.py on one core: text per second through the whole build, and the tokeniser's share of it.

    python tools/bench/bench_preprocess.py --tokenizer gpt-neox-20b/tokenizer.json

Builds a pool in this process, without workers, and encodes the same texts with nothing around, in turns; both must give the
same number of tokens. The input is documentation text gathered from this machine, unless ``--input`` names raw files. Times
are of the process's CPU, so that other work on the machine matters less; the wall clock of the build, waits for the disk
included, is printed as well. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the only way to keep the library on one thread

from megatron_groupmates.pool.index import MEMBER_FORMATS
from megatron_groupmates.pool.preprocess.build import build_pool
from megatron_groupmates.pool.preprocess.encode import read_batches
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.preprocess.records import DocumentFile, find_inputs
from megatron_groupmates.pool.tokenizer import PoolTokenizer


def gather(directory: Path) -> str:
    """Raw files made of what is on this machine."""
    tool = Path(__file__).parents[1] / "gather_documents.py"
    subprocess.run([sys.executable, str(tool), "--output", str(directory)], check=True, stdout=subprocess.DEVNULL)
    return str(directory / "pool")


def read_texts(inputs: list[str]) -> list[list[str]]:
    """The texts of all documents, in the batches in which the build encodes them."""
    files, _ = find_inputs(inputs)
    return [[document.text for document in documents] for file in files for documents, _ in read_batches(DocumentFile(file))]


def measure(inputs: list[str], batches: list[list[str]], tokenizer: PoolTokenizer, options: BuildOptions, scratch: Path) -> list[float]:
    """CPU seconds of the build and of the tokeniser alone, and wall seconds of the build."""
    start, wall = time.process_time(), time.perf_counter()
    summary, _ = build_pool(inputs, scratch / "pool", tokenizer, options)
    build, wall = time.process_time() - start, time.perf_counter() - wall
    start = time.process_time()
    num_tokens = sum(len(tokens) + 1 for batch in batches for tokens in tokenizer.encode_batch(batch))
    alone = time.process_time() - start
    assert summary is not None and summary["tokens_encoded"] == num_tokens, (summary, num_tokens)
    return [build, alone, wall]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json, a directory with one, or a Hugging Face name")
    parser.add_argument("--input", nargs="+", help="raw files (default: documentation text of this machine)")
    parser.add_argument("--pack", type=int, default=2049, help="tokens per context, 0 for one sample per document (default: %(default)s)")
    parser.add_argument("--member-format", choices=MEMBER_FORMATS, default="raw")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    options = BuildOptions(pack=args.pack or None, member_format=args.member_format)
    tokenizer = PoolTokenizer.load(args.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        inputs = args.input or [gather(Path(directory) / "raw")]
        batches = read_texts(inputs)
        tokenizer.encode_batch(batches[0])  # its engine is made on first use
        num_bytes = sum(len(text.encode()) for batch in batches for text in batch)
        times = []
        for number in range(args.repeats):
            scratch = Path(directory) / str(number)
            scratch.mkdir()
            times.append(measure(inputs, batches, tokenizer, options, scratch))
    build, alone, wall = (statistics.median(column) for column in zip(*times, strict=True))
    share = statistics.median(row[1] / row[0] for row in times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("| text, MB | members | engine | build, MB/s | tokeniser alone, MB/s | its share | build by the clock, MB/s | peak memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    speeds = [num_bytes / 1e6 / seconds for seconds in (build, alone, wall)]
    print(
        f"| {num_bytes / 1e6:.0f} | {args.member_format} | {tokenizer.engine} | {speeds[0]:.1f} | {speeds[1]:.1f} | {share:.0%} "
        f"| {speeds[2]:.1f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
