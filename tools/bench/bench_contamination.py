"""Compare the search for shared n-grams with the obvious one: a Python set of all n-grams of the references.

Both search the same ids in turns, one core, and must find the same n-grams in the same samples. The ids stand for words of
text files found on this machine; where these are too few they repeat, with a part of the ids changed. Pool and references
are of different files, and each line is taken once, as in a deduplicated corpus. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_groupmates.pool.references.contamination import ReferenceNgrams

FOLDERS = ("/usr/share", "/usr/lib", sys.prefix)
SUFFIXES = {".py", ".txt", ".rst", ".md", ".html", ".js", ".h", ".c", ".pm", ".sh"}
CHANGED = 0.15


def text_ids(num_pool: int, num_references: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of pool and references: words of documentation and source files numbered by frequency, no file in both."""
    files = sorted(path for folder in FOLDERS for path in Path(folder).rglob("*") if path.suffix in SUFFIXES and path.is_file())
    random.Random(seed).shuffle(files)
    words: list[str] = []
    seen: set[bytes] = set()
    for path in files:
        if len(words) >= num_pool + num_references:
            break
        for line in path.read_bytes()[:200_000].splitlines():
            if line not in seen:
                seen.add(line)
                words += line.decode(errors="replace").split()
    number_of = {word: number % 50_000 for number, (word, _) in enumerate(Counter(words).most_common())}
    ids = np.array([number_of[word] for word in words]).astype(dtype)
    generator, pool = np.random.default_rng(seed), ids[num_references:]
    parts = [pool]
    while sum(map(len, parts)) < num_pool:
        changed = generator.random(len(pool)) < CHANGED
        parts.append(np.where(changed, generator.permutation(pool), pool))
    return np.concatenate(parts)[:num_pool], ids[:num_references]


def grams(sample: np.ndarray, ngram: int) -> Iterator[tuple[int, ...]]:
    """n-grams of a sample as tuples."""
    values = sample.tolist()
    return zip(*(values[start:] for start in range(ngram)), strict=False)


def plain_search(wanted: set[tuple[int, ...]], samples: list[np.ndarray], ngram: int) -> dict[tuple[int, tuple[int, ...]], int]:
    """How often each wanted n-gram is in each sample."""
    found: dict[tuple[int, tuple[int, ...]], int] = {}
    for number, sample in enumerate(samples):
        for gram in grams(sample, ngram):
            if gram in wanted:
                found[number, gram] = found.get((number, gram), 0) + 1
    return found


def compare(samples: list[np.ndarray], references: list[np.ndarray], ngram: int, num_plain: int, repeats: int) -> tuple[float, float, int]:
    """Median seconds per id, plain (of the first ``num_plain`` samples) and fast (of all), and how many samples overlap."""
    tokens, lengths = np.concatenate(samples), np.array([len(sample) for sample in samples])
    searched = ReferenceNgrams(np.concatenate(references), np.array([len(reference) for reference in references]), ngram)
    wanted = {gram for reference in references for gram in grams(reference, ngram)}
    seconds: dict[str, list[float]] = {"plain": [], "fast": []}
    for _ in range(repeats):
        start = time.perf_counter()
        overlaps = searched.search(tokens, lengths)
        seconds["fast"].append((time.perf_counter() - start) / len(tokens))
        start = time.perf_counter()
        expected = plain_search(wanted, samples[:num_plain], ngram)
        seconds["plain"].append((time.perf_counter() - start) / lengths[:num_plain].sum())
    content = [tuple(row) for row in searched.distinct[overlaps.ngram].tolist()]
    found = {
        (number, gram): count
        for number, gram, count in zip(overlaps.sample.tolist(), content, overlaps.count.tolist(), strict=True)
        if number < num_plain
    }
    if found != expected or not expected:
        sys.exit(f"the n-grams found differ: {len(found)} and {len(expected)}")
    return statistics.median(seconds["plain"]), statistics.median(seconds["fast"]), len(np.unique(overlaps.sample))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pool-tokens", type=int, default=1 << 24, help="ids searched fast")
    parser.add_argument("--plain-tokens", type=int, default=1 << 20, help="of these, ids searched plainly as well, and compared")
    parser.add_argument("--reference-tokens", type=int, nargs="+", default=[1 << 18, 1 << 21], help="ids of the references")
    parser.add_argument("--context", type=int, default=2049, help="ids per sample")
    parser.add_argument("--ngram", type=int, default=13, help="ids per n-gram")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each; medians are shown")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of files")
    arguments = parser.parse_args()
    context = arguments.context
    print("| ids | reference ids | samples that overlap | Python set, M ids/s | here, M ids/s | ratio |\n|---|---|---|---|---|---|")
    for dtype in ("uint16", "uint32"):
        ids, all_references = text_ids(arguments.pool_tokens, max(arguments.reference_tokens), dtype, arguments.seed)
        samples = [ids[first : first + context] for first in range(0, len(ids) - context + 1, context)]
        for num_tokens in arguments.reference_tokens:
            held_out = all_references[:num_tokens]
            references = [held_out[first : first + context] for first in range(0, num_tokens, context)]
            num_plain = arguments.plain_tokens // context
            plain, fast, touched = compare(samples, references, arguments.ngram, num_plain, arguments.repeats)
            cells = [dtype, f"{num_tokens:,}", f"{touched:,} of {len(samples):,}", f"{1e-6 / plain:.2f}", f"{1e-6 / fast:.0f}"]
            print(f"| {' | '.join(cells)} | {plain / fast:.0f} |", flush=True)


if __name__ == "__main__":
    main()
