#!/usr/bin/env python
"""Time of indexing existing token shards, against reading them with tarfile and json and hashing them afterwards.

    OMP_NUM_THREADS=1 python tools/bench/bench_index_pool.py

One shard of random ids is written in each member format and read in turn by both versions, from a hot page cache, on
one core; the best of the repeats counts. Both find the same offsets, lengths and digest. The table also says what the
parts of the pass cost.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from isal import igzip

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_groupmates.pool.formats.archive import HashingFile, walk_tar
from megatron_groupmates.pool.formats.scan import ScanOptions, scan_shard
from megatron_groupmates.pool.index import MEMBER_FORMATS
from megatron_groupmates.pool.writer import write_shard
from megatron_groupmates.utils.files import sha256_file


def plain(path: Path, options: ScanOptions) -> tuple[list[int], list[int], str]:
    """Offsets, lengths and digest, in the obvious way."""
    offsets, lengths = [], []
    with tarfile.open(path) as tar:
        for info in tar:
            if not info.isfile():
                continue
            file = tar.extractfile(info)
            assert file is not None
            content = file.read()
            if info.name.endswith(".gz"):
                tokens = json.loads(gzip.decompress(content))
                assert min(tokens) >= 0 and max(tokens) < options.vocab_size
            else:
                tokens = np.frombuffer(content, options.token_dtype)
                assert tokens.max() < options.vocab_size
            offsets.append(info.offset_data)
            lengths.append(len(tokens))
    return offsets, lengths, sha256_file(path)


def ours(path: Path, options: ScanOptions) -> tuple[list[int], list[int], str]:
    """The same in one pass."""
    record = scan_shard(str(path), "shard", options).record
    return record.offsets.tolist(), record.lengths.tolist(), record.sha256


def count(path: Path, options: ScanOptions) -> None:
    """Headers, digest, and lengths by decompressing and counting commas: no id is looked at."""
    with open(path, "rb") as file:
        hashing = HashingFile(file)
        for member in walk_tar(hashing):
            if member.name.endswith(".gz"):
                igzip.decompress(member.content).count(b",")
        hashing.finish()


def walk(path: Path, options: ScanOptions) -> None:
    """Headers and digest, without a look into the members."""
    with open(path, "rb") as file:
        hashing = HashingFile(file)
        for _ in walk_tar(hashing):
            pass
        hashing.finish()


def walk_headers(path: Path, options: ScanOptions) -> None:
    """Headers alone."""
    with open(path, "rb", buffering=0) as file:
        for _ in walk_tar(file, headers_only=True):
            pass


def seconds(function: Callable[[Path, ScanOptions], object], path: Path, options: ScanOptions) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function(path, options)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048, help="in the shard (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2049, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    options = ScanOptions(50280, "uint16")
    # Ids of text are mostly small: this has about as many digits, and gzip makes as much of it.
    samples = [np.minimum(generator.zipf(1.15, args.length), 50279) for _ in range(args.samples)]
    versions = (plain, ours, count, walk, walk_headers)
    print("| members | MB | plain, MB/s | ours, MB/s | ratio | lengths only, MB/s | digest only, MB/s | headers alone, us a member |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for member_format in reversed(MEMBER_FORMATS):
            record = write_shard(Path(directory), 0, samples, options.token_dtype, member_format)
            path = Path(directory) / f"{record.name}.tar"
            assert plain(path, options) == ours(path, options) == (record.offsets.tolist(), record.lengths.tolist(), record.sha256)
            times = [[seconds(version, path, options) for version in versions] for _ in range(args.repeats)]
            best = [min(column) for column in zip(*times, strict=True)]
            megabytes = record.num_bytes / 1e6
            rates = [megabytes / seconds_taken for seconds_taken in best]
            print(
                f"| {member_format} | {megabytes:.0f} | {rates[0]:.0f} | {rates[1]:.0f} | {best[0] / best[1]:.1f} | {rates[2]:.0f} | "
                f"{rates[3]:.0f} | {best[4] / args.samples * 1e6:.1f} |"
            )


if __name__ == "__main__":
    main()
