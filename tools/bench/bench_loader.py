"""Compare reading half of a pool, chosen at random, with plain webdataset that reads the tars whole and filters by row.

Builds synthetic shards of 2,049-token samples, once with DCLM's `.json.gz` members and once with raw ones, in a temporary
directory. Every contender runs in turns on the same rows, files in the page cache, and must give the same tokens. First
in this process, by its CPU time: webdataset decodes (gzip, json) the chosen samples only, to lists or to arrays; the pool
is read in its own order, 64 samples at a time, and in random order, 8 at a time as training does, always to arrays. Then
through data loaders that make batches of 8 tensors, by the clock. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import webdataset

from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolFacts, PoolIndex, write_index
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.writer import write_shard
from megatron_groupmates.utils.files import sha256_bytes

LENGTH, VOCAB_SIZE, BATCH = 2049, 50_277, 8
TOKENIZER = b"{}"  # nothing here turns ids into text


def make_samples(count: int) -> np.ndarray:
    """Token ids ``[count, LENGTH]`` as frequent as those of text: Zipf's law, low ids first, as byte-pair merges come."""
    weights = 1 / np.arange(1, VOCAB_SIZE + 1)
    return np.random.default_rng(0).choice(VOCAB_SIZE, (count, LENGTH), p=weights / weights.sum())


def make_pool(directory: Path, samples: np.ndarray, num_shards: int, member_format: str) -> PoolIndex:
    """Write ``samples`` as a pool and open it."""
    directory.mkdir()
    parts = np.array_split(samples, num_shards)
    shards = [write_shard(directory, number, part, "uint16", member_format) for number, part in enumerate(parts)]
    (directory / TOKENIZER_FILE).write_bytes(TOKENIZER)
    facts = PoolFacts(
        member_format=member_format,
        token_dtype="uint16",
        vocab_size=VOCAB_SIZE,
        eot_id=0,
        tokenizer={"name": "none", "fingerprint": sha256_bytes(TOKENIZER)},
        kinds=[],
        made_by={},
    )
    write_index(directory, facts, shards, np.full(len(samples), -1, np.int16))
    return PoolIndex.open(directory)


def plain_webdataset(index: PoolIndex, rows: np.ndarray) -> Any:
    """A dataset of the samples ``rows`` as lists of ids, in pool order."""
    shards, rows_in_shard = index.locate(rows)
    chosen = {f"{shard:08d}_{row:08d}" for shard, row in zip(shards.tolist(), rows_in_shard.tolist(), strict=True)}
    urls = [str(index.shard_path(shard)) for shard in range(index.num_shards)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return dataset.select(lambda sample: sample["__key__"] in chosen).decode().map(lambda sample: sample["json.gz"])


class Batches(torch.utils.data.Dataset):
    """Batches of pool rows as tensors."""

    def __init__(self, index: PoolIndex, batches: list[np.ndarray]) -> None:
        self._reader, self._batches = PoolReader(index), batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self._reader.read_batch(self._batches[number]))


def split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of ``size`` rows."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def one_process(json: PoolIndex, raw: PoolIndex, rows: np.ndarray, shuffled: np.ndarray) -> dict[str, Callable[[], Iterator[Any]]]:
    """Contenders that yield samples or batches in this process."""

    def read(index: PoolIndex, order: np.ndarray, size: int) -> Callable[[], Iterator[Any]]:
        reader, batches = PoolReader(index), split(order, size)
        return lambda: (reader.read_batch(batch) for batch in batches)

    return {
        "webdataset, lists": lambda: iter(plain_webdataset(json, rows)),
        "webdataset, arrays": lambda: iter(plain_webdataset(json, rows).map(np.array)),
        "pool, .json.gz, in order": read(json, rows, 64),
        "pool, .json.gz, random": read(json, shuffled, BATCH),
        "pool, raw, in order": read(raw, rows, 64),
        "pool, raw, random": read(raw, shuffled, BATCH),
    }


def loaders(
    json: PoolIndex, raw: PoolIndex, rows: np.ndarray, shuffled: np.ndarray, workers: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Contenders that give batches of tensors through data loaders with ``workers`` processes."""
    processes = {"num_workers": workers, "persistent_workers": workers > 0}
    plain = plain_webdataset(json, rows).map(torch.tensor)
    ours = {
        f"pool, {name}, random": torch.utils.data.DataLoader(Batches(index, split(shuffled, BATCH)), batch_size=None, **processes)
        for name, index in ((".json.gz", json), ("raw", raw))
    }
    every = {"webdataset": webdataset.WebLoader(plain, batch_size=BATCH, **processes), **ours}
    return {f"{name}, {workers} workers": lambda loader=loader: iter(loader) for name, loader in every.items()}


def tokens_of(contender: Iterator[Any]) -> np.ndarray:
    """What a contender yields, as one sorted array of samples: the order differs between them."""
    found = np.concatenate([np.asarray(item).reshape(-1, LENGTH) for item in contender])
    return found[np.lexsort(found[:, :4].T)]


def compare(contenders: dict[str, Callable[[], Iterator[Any]]], expected: np.ndarray, repeats: int, clock: Callable[[], float]) -> None:
    """Check that all give the same tokens, time them in turns, print a row for each."""
    for name, start in contenders.items():
        if not np.array_equal(tokens_of(start()), expected):
            sys.exit(f"{name}: the tokens differ")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, start in contenders.items():
            began = clock()
            for _ in start():
                pass
            seconds[name].append(clock() - began)
    rates = {name: len(expected) / statistics.median(times) for name, times in seconds.items()}
    base = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / base:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=4096, help="samples in the pool, of which half are read")
    parser.add_argument("--num-shards", type=int, default=4, help="shards of the pool")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each; medians are shown")
    parser.add_argument("--num-workers", type=int, nargs="*", default=[0, 2], help="data loader processes to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples, generator = make_samples(arguments.num_samples), np.random.default_rng(1)
    rows = np.sort(generator.permutation(arguments.num_samples)[: arguments.num_samples // 2])
    shuffled, expected = generator.permutation(rows), tokens_of(iter([samples[rows]]))
    with tempfile.TemporaryDirectory() as directory:
        pools = [make_pool(Path(directory) / name, samples, arguments.num_shards, name) for name in ("json.gz", "raw")]
        print("| contender | samples/s | ratio |\n|---|---|---|")
        compare(one_process(*pools, rows, shuffled), expected, arguments.repeats, time.process_time)
        for workers in arguments.num_workers:
            compare(loaders(*pools, rows, shuffled, workers), expected, arguments.repeats, time.perf_counter)


if __name__ == "__main__":
    main()
