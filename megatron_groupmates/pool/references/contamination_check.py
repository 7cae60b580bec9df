"""Checking a whole pool against reference and evaluation sets: shard by shard, on several processes, resumable.

The output directory holds

- ``overlaps.jsonl``: for each overlapping sample of the pool, in pool order, ``{"shard", "row", "overlapping", "ngrams",
  "fraction", "examples": [[reference, shard, row], ...]}``: how many of its n-grams are in a reference, and in which examples;
- ``summary.json``: counts of the pool and of each reference;
- ``exclude.json``: the overlapping samples as an exclusion (:mod:`megatron_groupmates.pool.exclusion`);
- ``shards/``: what was found in each shard, so that a killed check goes on, and ``check.json``, what was checked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.exclusion import write_exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.members import decode_members
from megatron_groupmates.pool.references.contamination import Overlaps, ReferenceNgrams
from megatron_groupmates.utils.files import atomic_file, read_json, write_json
from megatron_groupmates.utils.progress import progress_bar
from megatron_groupmates.utils.storage import read_all

OVERLAPS_FILE, SUMMARY_FILE, EXCLUDE_FILE = "overlaps.jsonl", "summary.json", "exclude.json"
_JOB_FILE, _SHARDS = "check.json", "shards"


def read_shard(index: PoolIndex, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a whole shard, one sample after the other, in the pool's ``token_dtype``, and their lengths int64[rows].

    Raises:
        UserError: the shard is damaged.
        OSError: it cannot be read.
    """
    rows = slice(index.first_row[shard], index.first_row[shard + 1])
    starts, sizes, lengths = (column[rows].tolist() for column in (index.offsets, index.member_bytes, index.lengths))
    content = read_all(index.shard_path(shard))
    try:
        end = max(start + size for start, size in zip(starts, sizes, strict=True))
        if len(content) < end:
            raise ValueError(f"{end} bytes expected, found {len(content)}")
        members = decode_members(content, starts, sizes, lengths, index.member_format, index.token_dtype, index.vocab_size)
    except ValueError as error:
        raise UserError(f"{index.shard_path(shard)} is damaged: {error}; restore it or make the pool again") from error
    tokens = members.ravel() if isinstance(members, np.ndarray) else np.concatenate(members)
    return tokens.astype(index.token_dtype, copy=False), np.array(lengths, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class References:
    """The sets that a pool is checked against.

    Attributes:
        names: as the user gave them.
        indices: the sets.
        first_example: int64[number + 1], number of each set's first example, counting through all sets.
        lengths: int64[num_examples].
        ngrams: of all examples.
    """

    names: list[str]
    indices: list[PoolIndex]
    first_example: np.ndarray
    lengths: np.ndarray
    ngrams: ReferenceNgrams

    @classmethod
    def open(cls, pool: PoolIndex, names: Sequence[str], ngram: int) -> References:
        """Open and read the sets.

        Raises:
            UserError: one of them is no pool, has another tokenizer or is damaged, or ``ngram`` is too small.
        """
        indices = [PoolIndex.open(name) for name in names]
        for name, index in zip(names, indices, strict=True):
            if index.tokenizer["fingerprint"] != pool.tokenizer["fingerprint"]:
                raise UserError(
                    f"{name} was tokenised with {index.tokenizer}, the pool {pool.directory} with {pool.tokenizer}; token n-grams "
                    "can only be compared under one tokenizer"
                )
        parts = [read_shard(index, shard) for index in indices for shard in range(index.num_shards)]
        tokens = np.concatenate([part.astype(pool.token_dtype, copy=False) for part, _ in parts])
        lengths = np.concatenate([part for _, part in parts])
        first_example = np.cumsum([0, *(index.num_samples for index in indices)])
        return cls(list(names), indices, first_example, lengths, ReferenceNgrams(tokens, lengths, ngram))

    def name(self, example: int) -> list[Any]:
        """``[reference, shard, row]`` of an example."""
        number = int(np.searchsorted(self.first_example, example, side="right")) - 1
        index = self.indices[number]
        [shard], [row] = index.locate(np.array([example - self.first_example[number]]))
        return [self.names[number], index.shard_names[shard], int(row)]


def check_contamination(
    pool: Path | str,
    references: Sequence[str],
    output: Path | str,
    *,
    ngram: int = 13,
    max_pool_count: int | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Find the pool's samples that share an n-gram with a reference, and write what the module's docstring lists.

    A check of the same pool and references that was killed, or that ended with another ``max_pool_count``, searches no
    shard again.

    Args:
        pool: the pool.
        references: directories of reference and evaluation sets.
        output: directory.
        ngram: ids per n-gram.
        max_pool_count: n-grams in more samples of the pool than that are common phrases and do not count; None for no limit.
        num_workers: processes that search, 0 to do it in this one.

    Returns:
        The summary.

    Raises:
        UserError: pool or references do not fit together or are damaged, or ``output`` holds another check.
        OSError: something cannot be read or written.
    """
    output = Path(output)
    index = PoolIndex.open(pool)
    opened = References.open(index, references, ngram)
    fingerprints = [[name, reference.fingerprint] for name, reference in zip(opened.names, opened.indices, strict=True)]
    _bind(output, {"pool": index.fingerprint, "references": fingerprints, "ngram": ngram})
    _search_all(index, opened, output / _SHARDS, num_workers)
    parts = [_load(output / _SHARDS, shard) for shard in range(index.num_shards)]
    rows = np.concatenate([part.sample + index.first_row[shard] for shard, part in enumerate(parts)])
    found = Overlaps(rows, np.concatenate([part.ngram for part in parts]), np.concatenate([part.count for part in parts]))
    in_samples = np.bincount(found.ngram, minlength=opened.ngrams.num_ngrams)
    common = in_samples > (index.num_samples if max_pool_count is None else max_pool_count)
    kept = Overlaps(*(column[~common[found.ngram]] for column in (found.sample, found.ngram, found.count)))
    summary = _report(index, opened, kept, output, {"ngram": ngram, "max_pool_count": max_pool_count, "common_ngrams": int(common.sum())})
    write_json(output / SUMMARY_FILE, summary)
    return summary


def _bind(output: Path, job: dict[str, Any]) -> None:
    """Say what the directory's results are of, or refuse one with those of another check."""
    path = output / _JOB_FILE
    if path.is_file():
        present = read_json(path)
        different = [f"{name} was {present.get(name)}, is {value}" for name, value in job.items() if present.get(name) != value]
        if different:
            raise UserError(f"{output} holds another check ({'; '.join(different)}); choose another --output or remove it")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty and holds no check; choose another --output")
    write_json(path, job)


def _shard_file(directory: Path, shard: int) -> Path:
    return directory / f"{shard:08d}.npz"


def _load(directory: Path, shard: int) -> Overlaps:
    with np.load(_shard_file(directory, shard)) as content:
        return Overlaps(content["sample"], content["ngram"], content["count"])


def _search_all(index: PoolIndex, references: References, directory: Path, num_workers: int) -> None:
    """Search every shard that has no result yet."""
    missing = [shard for shard in range(index.num_shards) if not _shard_file(directory, shard).is_file()]
    tokens_of = np.add.reduceat(index.lengths, index.first_row[:-1], dtype=np.int64)
    done = int(tokens_of.sum() - tokens_of[missing].sum())
    with progress_bar(int(tokens_of.sum()), "search shards", unit="token", unit_scale=True, initial=done) as bar:
        for shard in _searched(index, references.ngrams, directory, missing, num_workers):
            bar.update(int(tokens_of[shard]))


def _searched(index: PoolIndex, ngrams: ReferenceNgrams, directory: Path, shards: list[int], num_workers: int) -> Iterator[int]:
    """Numbers of the shards as they are done."""
    search = functools.partial(_search, index, ngrams, directory)
    if num_workers == 0:
        for shard in shards:
            yield search(shard)
        return
    executor = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (search,))
    try:
        for future in as_completed([executor.submit(_search_in_worker, shard) for shard in shards]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(f"a searching process was killed, probably for want of memory; use fewer than {num_workers} --workers") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _search(index: PoolIndex, ngrams: ReferenceNgrams, directory: Path, shard: int) -> int:
    found = ngrams.search(*read_shard(index, shard))
    with atomic_file(_shard_file(directory, shard)) as file:
        np.savez(file, **vars(found))
    return shard


_worker_search: Callable[[int], int] | None = None


def _start_worker(search: Callable[[int], int]) -> None:
    """Keep the references in this worker process."""
    global _worker_search
    _worker_search = search


def _search_in_worker(shard: int) -> int:
    assert _worker_search is not None
    return _worker_search(shard)


def _report(index: PoolIndex, references: References, found: Overlaps, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write overlaps and exclusion; the summary."""
    ngrams = references.ngrams
    rows, first = np.unique(found.sample, return_index=True)
    overlapping = np.add.reduceat(found.count, first) if len(rows) else found.count
    shards, rows_in_shard = index.locate(rows)
    with atomic_file(output / OVERLAPS_FILE) as file:
        for number, numbers in enumerate(np.split(found.ngram, first[1:]) if len(rows) else ()):
            total = int(index.lengths[rows[number]]) - ngrams.ngram + 1
            line = {
                "shard": index.shard_names[shards[number]],
                "row": int(rows_in_shard[number]),
                "overlapping": int(overlapping[number]),
                "ngrams": total,
                "fraction": round(int(overlapping[number]) / total, 6),
                "examples": [references.name(example) for example in ngrams.examples_of(numbers).tolist()],
            }
            file.write(json.dumps(line).encode() + b"\n")
    touched = ngrams.examples_of(np.unique(found.ngram))
    digest = write_exclusion(
        output / EXCLUDE_FILE, index, rows, {"tool": "check_contamination", "references": references.names, **settings}
    )
    return {
        "pool": str(index.directory),
        **settings,
        "samples": index.num_samples,
        "tokens": index.num_tokens,
        "overlapping_samples": len(rows),
        "overlapping_ngrams": int(found.count.sum()),
        "exclusion_digest": digest,
        "references": {name: _coverage(references, number, touched) for number, name in enumerate(references.names)},
    }


def _coverage(references: References, number: int, touched: np.ndarray) -> dict[str, Any]:
    """Counts of one reference; examples of fewer ids than an n-gram cannot be checked."""
    start, stop = references.first_example[number : number + 2].tolist()
    num_touched = int(((touched >= start) & (touched < stop)).sum())
    return {
        "examples": stop - start,
        "examples_too_short": int((references.lengths[start:stop] < references.ngrams.ngram).sum()),
        "examples_touched": num_touched,
        "share_touched": round(num_touched / (stop - start), 6),
    }
